"""Forget gates grafted onto a pretrained Transformer, which then learns to forget by finetuning.

from foxlm.conversion.graft import graft

model = graft("path/to/a/llama")

The result is a FoX model of the same weights, whose gates do not depend on the data yet: each head starts with a decay
time of its own, and with infinite ones (`decay_times=math.inf`) computes what the pretrained model does.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from foxlm.conversion.checkpoint_io import check_sizes, headers_to_load, read_fields
from foxlm.conversion.formats.format import one_kind_of_error
from foxlm.conversion.formats.llama_family import base_config, base_of, check_model_type
from foxlm.conversion.hub.links import check_links
from foxlm.conversion.new_folder import TEXT_FILES, check_new, copy_text_files, new_folder
from foxlm.conversion.pretrained import read_config, read_model
from foxlm.conversion.weight_map import Plan, Rename, distinct_weights, make_model, plan_to_ours
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.layers.forget_gate import bias_for_times, log_spaced_times
from foxlm.modeling.modeling_fox import FoxForCausalLM

DecayTimes = float | Sequence[float] | Sequence[Sequence[float]] | Tensor

_GATES = ("full", "bias_only", "fixed", "none")
_LOCAL = 64.0
_BEYOND_CONTEXT = 16.0
# Beside the biases of the gates, all that is new.
_NEW_ZEROS = ("forget_gate.weight", "output_gate.weight")
_FETCHED = ["config.json", "model*.safetensors*", *TEXT_FILES]


def graft(
    model: PreTrainedModel | str | Path,
    *,
    decay_times: DecayTimes | None = None,
    forget_gate: str = "full",
    forget_gate_heads: str = "query",
    output_gate: bool = False,
    keep_rope: bool = True,
) -> FoxForCausalLM:
    """A pretrained Transformer with forget gates, in its own type of numbers and on its device; a copy.

    Token shift, output norm and QK-norm where there is none change what a model computes however they start, and are
    not offered. To get back the base model's numbers on a GPU too, where weights up to `acp_eps` are left out, set
    `model.config.acp_eps` to None.

    Args:
        model: a language model of transformers (llama, mistral, qwen2, qwen3, smollm3, olmo2), its folder, or its name
            on the Hugging Face Hub.
        decay_times: decay time in tokens that each gate starts from: `log f = -1 / T`, whatever the token. A number for
            all; `(min, max)`, log-spaced over the heads of each layer; or a table `[layers, gates]`. None is
            `(64, 16 * max_position_embeddings)`, from local to longer than the context. Infinite ones, in a table or
            for all, leave a head as it was, and since their gradient is zero, it stays so.
        forget_gate: as in `FoxConfig`: `"full"`, whose weights start from zero, `"bias_only"` or `"fixed"`; or
            `"none"`, the base model as a FoX model, to compare finetuning with and without gates.
        forget_gate_heads: `"query"` or `"key_value"`, as in `FoxConfig`.
        output_gate: whether to add an output gate. It starts from 1/2 everywhere, which doubled weights make up for.
        keep_rope: whether to keep rotary embeddings. A model without them is another one, even where no gate forgets.

    Raises:
        ValueError: the model has a part that a FoX model cannot represent, or an argument is not as above; the message
            names what stands in the way.
        OSError: a file of the model cannot be read.
    """
    if forget_gate not in _GATES:
        raise ValueError(f"forget_gate must be one of {_GATES}, got {forget_gate!r}")
    if forget_gate == "none" and decay_times is not None:
        raise ValueError("decay_times has no effect with forget_gate 'none'")
    if isinstance(model, str | Path):
        model = _folder_of(model)
    with one_kind_of_error():
        theirs = _config_of(model)
        config = base_config(
            theirs,
            keep_rope=keep_rope,
            forget_gate=forget_gate,
            forget_gate_heads=forget_gate_heads,
            use_output_gate=output_gate,
        )
    config.grafted_from = theirs.model_type
    biases = {} if forget_gate == "none" else _set_decay_times(config, decay_times)

    with one_kind_of_error():
        plan = _plan(config, base_of(theirs).zeros + _NEW_ZEROS)
    if isinstance(model, PreTrainedModel):
        weights = {name: weight.clone() for name, weight in _plain_weights(model).items()}
    else:
        model = _load(model, plan)
        weights = _plain_weights(model)
    if output_gate:
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.o_proj.weight"
            weights[name] = 2 * weights[name]
    gate_dtype = torch.promote_types(model.dtype, torch.float32)
    weights |= {name: bias.to(gate_dtype) for name, bias in biases.items()}
    plan.check(weights, weights.__getitem__)
    grafted = make_model(plan, config, weights.__getitem__, model.dtype).to(model.device)
    grafted.generation_config = copy.deepcopy(model.generation_config)
    return grafted


def graft_to_folder(source: str | Path, out: str | Path, **options: Any) -> None:
    """Write `graft` of ``source``, and its tokenizer, to the new folder ``out``: whole or not at all.

    Args:
        source: folder, or name on the Hugging Face Hub.
        out: folder to make.
        options: of `graft`.

    Raises:
        ValueError: ``out`` is there already, or in ``source``; or as `graft`.
        OSError: as `graft`.
    """
    # Before anything is fetched or read, and again when the folder is made.
    check_new(Path(out), Path(source))
    source = _folder_of(source)
    model = graft(source, **options)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        copy_text_files(source, folder)


def decay_time_table(decay_times: DecayTimes | None, config: FoxConfig) -> Tensor:
    """``[layers, gates]`` float64 decay times from what `graft` takes; raises a `ValueError` for anything else."""
    shape = (config.num_hidden_layers, config.num_forget_gates)
    if decay_times is None:
        decay_times = (_LOCAL, _BEYOND_CONTEXT * config.max_position_embeddings)
    accepted = f"a number of tokens, (min, max), or a table of shape {list(shape)}"
    try:
        times = torch.as_tensor(decay_times, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"decay_times must be {accepted}, got {decay_times!r}: {error}") from error
    if times.shape not in ((), (2,), shape):
        raise ValueError(f"decay_times must be {accepted}, got shape {list(times.shape)}")
    # Also false for NaN.
    if not (times > 0).all():
        raise ValueError(f"decay_times must be positive, got {times[~(times > 0)][0].item()}")
    if times.shape == (2,):
        low, high = times.tolist()
        if not low <= high < math.inf:
            raise ValueError(f"decay_times must be min <= max, both finite, got min {low} and max {high}")
        times = log_spaced_times(low, high, shape[1])
    return times.expand(shape)


def _set_decay_times(config: FoxConfig, decay_times: DecayTimes | None) -> dict[str, Tensor]:
    """Record decay times in ``config``; the float64 biases of its gates that have them."""
    times = decay_time_table(decay_times, config)
    # For gates made anew, and for whoever reads it.
    config.decay_time_min, config.decay_time_max = (_recorded(time) for time in (times.min(), times.max()))
    return {
        f"model.layers.{layer}.self_attn.forget_gate.bias": bias for layer, bias in enumerate(bias_for_times(times))
    }


def _plan(config: FoxConfig, zeros: tuple[str, ...]) -> Plan:
    """Weights are those of the same name, but for names that end as one of ``zeros``."""
    with torch.device("meta"):
        model = FoxForCausalLM(config)
    renames = [Rename(None if name.endswith(zeros) else name, (name,)) for name in distinct_weights(model)]
    return plan_to_ours(renames, model)


def _folder_of(source: str | Path) -> Path:
    """The folder itself, or that of what the name stands for on the Hub, fetched if need be."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=_FETCHED))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model must be a folder, or the name of a model on the Hugging Face Hub, got {str(source)!r}: "
                + str(error).split("\n")[0]
            ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must hold a config.json, got {folder}")
    check_links(folder)
    fields = read_fields(folder)
    check_model_type(fields.get("model_type"))
    if (headers := headers_to_load(folder)) is not None:
        check_sizes(fields, headers)
    return folder


def _recorded(time: Tensor) -> float:
    """A decay time as the configuration takes it, without the roundings of spacing."""
    return float(f"{min(time.item(), 1e9):.9g}")


def _config_of(model: PreTrainedModel | Path) -> PreTrainedConfig:
    if isinstance(model, Path):
        return read_config(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a model of transformers, a folder or a name on the Hub, got {type(model).__name__}; "
            "adapters are merged first"
        )
    base_of(model.config)
    expected = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), PreTrainedModel)
    # A subclass may compute anything.
    if type(model) is not expected:
        raise ValueError(f"model must be a {expected.__name__}, got {type(model).__name__}")
    return model.config


def _load(source: Path, plan: Plan) -> PreTrainedModel:
    """The model in a folder; raises a `ValueError` if its files do not hold all that ``plan`` reads."""
    headers = headers_to_load(source) or {}
    held, needed = sum(x.numel() for x in headers.values()), sum(shape.numel() for shape in plan.reads.values())
    # Weights that are not there would be made up, whatever their size. Gates are few and never there.
    if headers and needed > 2 * held:
        raise ValueError(
            f"config.json describes a model of {needed:,} numbers, but the files of {source} hold {held:,}"
        )
    # Weights that are missing or misshapen are made up, those that are too many left out: reported, and refused here.
    model, found = read_model(source, dtype="auto", ignore_mismatched_sizes=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):
            raise ValueError(f"model must be complete, got {source} with {kind} {', '.join(names[:5])}")
    return model


def _plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    weights = model.state_dict()
    for name, weight in weights.items():
        if type(weight) is not Tensor or weight.is_meta or weight.dtype != model.dtype:
            raise ValueError(
                f"weights must be in memory, whole, and all {model.dtype}, got {name} as {type(weight).__name__} of "
                f"{weight.dtype} on {weight.device}"
            )
    return weights
