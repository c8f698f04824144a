"""What the attention benchmark compares: this library, with pruning and without, and baselines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from foxlm.kernels.attention import forgetting_attention
from foxlm.kernels.backends import backend_of
from foxlm.kernels.decay import accumulate
from foxlm.kernels.pruning.prune import share_skipped
from foxlm.kernels.pruning.rules import Rule
from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES
from foxlm.modeling.configuration_fox import DEFAULT_EPS, DEFAULT_LOG_EPS

from ...gates import RULES, decay_of, first_read, kept_from, search, share_of_tiles_skipped
from ...recording import AttentionInputs
from ..models import ours
from ..runner import MissingError

_FLEX_BLOCK = 128

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Output from q, k, v and log_f."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute causal attention.

    Attributes:
        name: as it appears in tables.
        prepare: makes the function to time from the inputs; what it needs beside them (a compiled function, a block
            mask, sums of gates for a bias) is made before it is timed.
        gated: whether the output depends on the forget gates.
        gate_gradient: whether their gradient is computed.
        head_first: whether it takes ``[B, H, T, D]`` instead of ``[B, T, H, D]``.
        rule: of pruning, None without.
        is_ours: whether it is this library's.
        needs_gpu: whether it, or its backward pass, runs on a GPU only.
    """

    name: str
    prepare: Callable[[AttentionInputs], Attend]
    gated: bool = True
    gate_gradient: bool = True
    head_first: bool = False
    rule: Rule | None = None
    is_ours: bool = False
    needs_gpu: bool = False

    def computed_tiles(self, layer: AttentionInputs) -> float:
        """Computed-tile fraction: by this library's kernels what their search gives, else by definition."""
        if self.rule is None:
            return 1.0
        if self.is_ours:
            return 1.0 - share_of_tiles_skipped(first_read(layer, DEFAULT_LOG_EPS, self.rule)).mean().item()
        return defined_tiles(layer, self.rule, (_FLEX_BLOCK, _FLEX_BLOCK))


def defined_tiles(layer: AttentionInputs, rule: Rule, tile: tuple[int, int] = (PRUNED_QUERIES, PRUNED_KEYS)) -> float:
    """Computed-tile fraction by the definition of ``rule``, in tiles of so many queries and keys."""
    return 1.0 - share_skipped(kept_from(layer, DEFAULT_LOG_EPS, rule, *tile), layer.q.shape[1], *tile).mean().item()


def pruning_options(rule: Rule | None, logit_bound: float | Tensor | None) -> dict[str, Any]:
    """How `forgetting_attention` is told to prune by ``rule``, or not to."""
    if rule is None:
        return {}
    return {"eps": DEFAULT_EPS, "rule": rule, "logit_bound": logit_bound if rule == "paper" else None}


def _ours(rule: Rule | None) -> Implementation:
    def prepare(layer: AttentionInputs) -> Attend:
        if rule is not None and layer.centers:
            return lambda *inputs: _attend_as_model(layer, rule, *inputs)
        options = pruning_options(rule, layer.logit_bound)
        return lambda *inputs: forgetting_attention(*inputs, scale=layer.scale, **options)

    return Implementation(ours(rule), prepare, rule=rule, is_ours=True)


def _attend_as_model(layer: AttentionInputs, rule: Rule, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
    """As a model without QK-norm does it: its search uses centered keys, which the public function does not offer."""
    layer = layer._replace(q=q, k=k, log_f=log_f)
    decay = search(layer, decay_of(layer), DEFAULT_LOG_EPS, rule)
    return backend_of(q).attention(q, k, v, decay, scale=layer.scale, dropout=0.0)[0]


def _sdpa(name: str, backend: SDPBackend) -> Implementation:
    def prepare(layer: AttentionInputs) -> Attend:
        options: dict[str, Any] = {"is_causal": True, "scale": layer.scale}
        if layer.k.shape[2] != layer.q.shape[2]:
            options["enable_gqa"] = True

        def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

        return attend

    needs_gpu = backend == SDPBackend.CUDNN_ATTENTION
    return Implementation(name, prepare, gated=False, gate_gradient=False, head_first=True, needs_gpu=needs_gpu)


def _flex(name: str, rule: Rule | None, backend: Literal["AUTO", "FLASH"] = "AUTO") -> Implementation:
    """FlexAttention with the decay as a bias and pruning as a block mask; no gradient reaches the gates."""

    def prepare(layer: AttentionInputs) -> Attend:
        if backend == "FLASH":
            _need_flash_attention_4()
        if layer.q.shape[1] % _FLEX_BLOCK:
            raise ValueError(f"FlexAttention is compared at multiples of {_FLEX_BLOCK} tokens, got {layer.q.shape[1]}")
        c = accumulate(layer.log_f.repeat_interleave(layer.q.shape[2] // layer.log_f.shape[2], dim=2))[0].float()
        tile = (_FLEX_BLOCK, _FLEX_BLOCK)
        mask = causal_block_mask(
            c, None if rule is None else kept_from(layer, DEFAULT_LOG_EPS, rule, *tile) // _FLEX_BLOCK
        )
        # torch has no annotations for compiled functions.
        attend: Callable = torch.compile(flex_attention, dynamic=False)
        options = {"block_mask": mask, "scale": layer.scale, "enable_gqa": layer.k.shape[2] != layer.q.shape[2]}
        options["kernel_options"] = {"BACKEND": backend}

        def decay(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + (c[b, h, i] - c[b, h, j])

        return lambda q, k, v, log_f: attend(q, k, v, score_mod=decay, **options)

    return Implementation(name, prepare, gate_gradient=False, head_first=True, rule=rule, needs_gpu=True)


def causal_block_mask(c: Tensor, first: Tensor | None) -> BlockMask:
    """The blocks that each block of queries keeps, one range that ends on the diagonal.

    Args:
        c: ``[B, H, T]``, for its shape.
        first: ``[B, H, T / 128]`` first block of keys that each block of queries keeps; None keeps all.
    """
    batch, heads, tokens = c.shape
    blocks = tokens // _FLEX_BLOCK
    index = torch.arange(blocks, device=c.device)
    if first is None:
        first = torch.zeros(batch, heads, blocks, dtype=torch.int64, device=c.device)
    columns = index.expand(batch, heads, blocks, blocks)
    # Entries beyond a row's count are not read, but must be blocks that exist.
    below = (columns + first[..., None]).clamp(max=blocks - 1)
    diagonal = (columns + index[:, None]).clamp(max=blocks - 1)
    counts = torch.ones_like(first, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        counts, diagonal.int(), (index - first).int(), below.int(), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=_causal
    )


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _fla() -> Implementation:
    def prepare(layer: AttentionInputs) -> Attend:
        if find_spec("fla") is None:
            raise MissingError("flash-linear-attention is not installed")
        from fla.ops.forgetting_attn import parallel_forgetting_attn

        # It takes a gate for each query head.
        shared = layer.q.shape[2] // layer.log_f.shape[2]
        return lambda q, k, v, log_f: parallel_forgetting_attn(
            q, k, v, log_f.repeat_interleave(shared, dim=2) if shared > 1 else log_f, scale=layer.scale
        )

    return Implementation("flash-linear-attention", prepare, needs_gpu=True)


def _authors(name: str, rule: Rule | None) -> Implementation:
    """The kernels of the papers' authors, from the package of their repository, ``forgetting_transformer``."""

    def prepare(layer: AttentionInputs) -> Attend:
        if find_spec("forgetting_transformer") is None:
            raise MissingError("the authors' forgetting_transformer is not installed")
        from forgetting_transformer.ops.forgetting_attention import forgetting_attention as attention

        if not layer.q.shape[2] == layer.k.shape[2] == layer.log_f.shape[2]:
            raise MissingError("the authors' kernels take as many key/value heads and gates as query heads")
        # Versions from before pruning know no threshold.
        options: dict[str, Any] = {"head_first": True, "sm_scale": layer.scale}
        if rule is not None:
            if layer.logit_bound is None:
                raise MissingError("the authors' rule needs a bound of the logits")
            options["adaptive_threshold"] = DEFAULT_LOG_EPS - 2.0 * layer.logit_bound - math.log(layer.q.shape[1])
        return lambda q, k, v, log_f: attention(q, k, v, log_f.transpose(1, 2), **options)

    return Implementation(name, prepare, head_first=True, rule=rule, needs_gpu=True)


def _need_flash_attention_4() -> None:
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise MissingError("flash-attn-4 is not installed")


def _flash_attention_4() -> Implementation:
    def prepare(layer: AttentionInputs) -> Attend:
        _need_flash_attention_4()
        from flash_attn.cute import flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
            # Beside the output the log-sum-exp, or None.
            out = flash_attn_func(q, k, v, softmax_scale=layer.scale, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return attend

    return Implementation("FlashAttention-4, no gate", prepare, gated=False, gate_gradient=False, needs_gpu=True)


OURS = tuple(_ours(rule) for rule in (None, *RULES, "measured"))
BASELINES = (
    _sdpa("cuDNN, no gate", SDPBackend.CUDNN_ATTENTION),
    _sdpa("FlashAttention-2 of torch, no gate", SDPBackend.FLASH_ATTENTION),
    _flash_attention_4(),
    _flex("FlexAttention + bias", None),
    _flex("FlexAttention + bias + ACP blocks", "paper"),
    _flex("FlexAttention, FLASH backend, + bias + ACP blocks", "paper", "FLASH"),
    _fla(),
    _authors("authors' kernels", None),
    _authors("authors' kernels, ACP", "paper"),
)


def chosen(names: Sequence[str]) -> list[Implementation]:
    """The implementations whose names contain one of ``names``; all of them for none."""
    return with_names([*OURS, *BASELINES], names)


def with_names(known: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Those of ``known`` whose ``name`` contains one of ``names``; all of them for none.

    Raises:
        ValueError: one of ``names`` is part of no name.
    """
    for name in names:
        if not any(name.lower() in one.name.lower() for one in known):
            raise ValueError(f"--only must be part of one of {[one.name for one in known]}, got {name!r}")
    return [one for one in known if not names or any(name.lower() in one.name.lower() for name in names)]
