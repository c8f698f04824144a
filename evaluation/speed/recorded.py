"""Inputs of the attention benchmark from a trained model that reads real text, with the gates that it has learned."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foxlm.evaluation.recording import AttentionInputs, record_attention

from .inputs import Case, Inputs
from .timing import release_memory
from .workload import Workload


@dataclass(frozen=True)
class Recorded:
    """What entered the attention of every layer, the layers and rows of text as one batch.

    Attributes:
        case: its shape, the batch layers times rows.
        inputs: layer by layer, in each row by row. The output's gradient is random.
        facts: ``model`` and ``text`` by name, ``layers``, ``rows``, ``length``, ``gate_heads``.
    """

    case: Case
    inputs: Inputs
    facts: dict[str, Any]


def record_inputs(workload: Workload, rows: int, length: int, dtype: torch.dtype) -> Recorded:
    """Let the model of ``workload`` read ``rows`` rows of ``length`` tokens, one at a time.

    Args:
        workload: with a model and its text.
        rows: of text.
        length: tokens of each.
        dtype: of the weights, and so of queries, keys and values.

    Raises:
        ValueError, OSError: model or text cannot be read, there is less text, or the model has no forget gates.
    """
    model = workload.build(dtype)
    if model.config.forget_gate == "none":
        raise ValueError(f"--model must have forget gates to be measured, got forget_gate 'none' in {workload.model}")
    ids = workload.ids(model.config.vocab_size, rows, length, repeat=False)
    # Each row's parts go to the processor's memory: the model and all layers beside their copy may not fit.
    found: list[list[AttentionInputs]] = []
    for row in ids.split(1):
        with torch.no_grad(), record_attention(model) as layers:
            model.model(row, use_cache=False)
        found.append([_moved(layer, "cpu") for layer in layers])
    del model, layers
    release_memory(workload.device)
    inputs = _stacked([layer for of_layer in zip(*found, strict=True) for layer in of_layer], workload)
    batch, tokens, heads, head_dim = inputs.q.shape
    facts = workload.facts() | {"layers": batch // rows, "rows": rows, "length": length}
    facts["gate_heads"] = inputs.log_f.shape[2]
    return Recorded(Case(batch, heads, head_dim, tokens, inputs.k.shape[2]), inputs, facts)


def _moved(layer: AttentionInputs, device: str) -> AttentionInputs:
    moved: dict[str, Any] = {name: x.to(device) for name, x in layer._asdict().items() if isinstance(x, Tensor)}
    return layer._replace(**moved)


def _stacked(layers: list[AttentionInputs], workload: Workload) -> Inputs:
    """All ``layers``, each of one row, as one batch on the workload's device."""
    device = workload.device
    q, k, v, log_f = (torch.cat([getattr(one, name) for one in layers]).to(device) for name in ("q", "k", "v", "log_f"))
    generator = torch.Generator(device).manual_seed(workload.seed)
    dout = torch.randn(q.shape, generator=generator, device=device).to(q.dtype)
    first = layers[0]
    bounds = [one.logit_bound for one in layers]
    # Without QK-norm no layer has one.
    known = [bound.float().expand(q.shape[2]) for bound in bounds if bound is not None]
    bound = torch.stack(known).to(device) if len(known) == len(layers) else None
    return Inputs(q, k, v, log_f, dout, scale=first.scale, logit_bound=bound, centers=first.centers)
