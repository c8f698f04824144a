"""The share of attention that pruning skips on a batch as it is trained on: packed, padded, sharded or compiled."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foxlm.kernels.argument_types import typed
from foxlm.kernels.decay import Decay, without_padding
from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES
from foxlm.modeling.attention_implementations import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, pruned
from foxlm.modeling.attention_settings import attention_settings
from foxlm.modeling.layers.attention import FoxAttention
from foxlm.modeling.modeling_fox import FoxForCausalLM, FoxModel

from .recording import replaced_attention

# What of a batch decides on attention; labels and what trainers keep beside do not.
_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


@typed
@torch.no_grad()
def skipped_share(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Share of attention's tiles, 128 queries by 64 keys, that pruning skips on ``batch``, over all layers and heads.

    Counted are the tiles that would be computed without pruning: in packed rows those within a document, and none of
    padding alone. By the ``acp_eps`` and ``acp_rule`` of the model's configuration, with any attention implementation
    and device: what does not prune, as on a CPU, is measured as if it did.

    It runs the model once, in evaluation mode, without gradients and without torch.compile, and leaves modes and random
    numbers as they were. Where weights are sharded all ranks must call it; each gets the share of its own batch, and
    with tensor parallelism of its own heads.

    Args:
        model: a FoX model, also in a wrapper (PEFT, FSDP).
        batch: arguments of its forward, on its device, of which masks, positions and packing are read beside tokens.

    Returns:
        A float64 number on the device, in ``[0, 1)``; None if there are no FoX layers that prune (``acp_eps=None``,
        no gates, code that was loaded with a folder), no tokens in ``batch``, or with context parallelism.
    """
    attentions = [module for module in model.modules() if isinstance(module, FoxAttention)]
    sharded = any(isinstance(x, FoxModel) and x.context_parallel is not None for x in model.modules())
    inputs = {name: batch[name] for name in _INPUTS if batch.get(name) is not None}
    prunes = any(attention_settings(x.config).eps is not None for x in attentions)
    if sharded or not inputs.keys() & set(_INPUTS[:2]) or not prunes:
        return None
    if any(isinstance(module, FoxForCausalLM) for module in model.modules()):
        inputs["logits_to_keep"] = 1
    name = attention_settings(attentions[0].config).implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    before: list[Tensor] = []
    after: list[Tensor] = []

    def counting(module, query, key, value, attention_mask, *, decay, scaling, real, backend, settings, **kwargs):
        if settings.eps is not None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            q, k, _ = without_padding(q, k, v, decay, real)
            before.append(_tiles_read(decay, q.shape[2]))
            # Those of training, which this pass without gradients does not go by.
            of_training = attention_settings(module.config)
            kept = pruned(module, of_training, q, k, decay, scaling, backend, sink=kwargs["sink"])
            after.append(_tiles_read(kept, q.shape[2]))
        kwargs |= {"decay": decay, "scaling": scaling, "real": real, "backend": backend, "settings": settings}
        return attend(module, query, key, value, attention_mask, **kwargs)

    # A compiled layer would be compiled again for the other attention function.
    with _evaluating(model), replaced_attention(name, counting), torch.compiler.set_stance("force_eager"):
        model(**inputs, use_cache=False)
    tiles = torch.stack(before).sum()
    return (tiles - torch.stack(after).sum()).double() / tiles.clamp(min=1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context is open; not `train` after it, since a part may have been left out of that."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _tiles_read(decay: Decay, heads: int) -> Tensor:
    """Number of tiles that attention computes for ``heads`` query heads, over batch and heads."""
    # Beyond any key, and exact as the float that `pad` takes it for.
    none = torch.iinfo(torch.int32).max
    first = decay.kv_start.masked_fill(decay.kv_start > decay.last, none)
    padding = (0, -first.shape[-1] % PRUNED_QUERIES)
    starts = nn.functional.pad(first, padding, value=none).unflatten(-1, (-1, PRUNED_QUERIES)).amin(-1) // PRUNED_KEYS
    ends = nn.functional.pad(decay.last, padding).unflatten(-1, (-1, PRUNED_QUERIES)).amax(-1) // PRUNED_KEYS + 1
    return (ends - starts).clamp(min=0).sum() * (heads // first.shape[1])
