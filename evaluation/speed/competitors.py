"""What else one could run: attention without gates, as a ceiling, and other implementations with them."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foxlm.kernels.pruning.rules import Rule

from . import flex
from .implementations import EPS, Attend, Implementation, all_tiles, first_by_definition, share_kept
from .inputs import Inputs

CUDNN = "cuDNN, no gate"


def _sdpa(name: str, backend: SDPBackend) -> Implementation:
    def prepare(inputs: Inputs) -> Attend:
        options: dict[str, Any] = {"is_causal": True, "scale": inputs.scale}
        if inputs.k.shape[2] != inputs.q.shape[2]:
            options["enable_gqa"] = True

        def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

        return attend

    def missing(device: str) -> str | None:
        return "needs a GPU" if backend == SDPBackend.CUDNN_ATTENTION and device != "cuda" else None

    return Implementation(name, prepare, gated=False, gate_gradient=False, head_first=True, missing=missing)


def _flex(name: str, rule: Rule | None) -> Implementation:
    tile = (flex.BLOCK, flex.BLOCK)

    def prepare(inputs: Inputs) -> Attend:
        first = None if rule is None else first_by_definition(inputs, rule, tile) // flex.BLOCK
        return flex.compiled_attention(inputs, first)

    def tiles_kept(inputs: Inputs) -> float:
        assert rule is not None
        return share_kept(first_by_definition(inputs, rule, tile), inputs.q.shape[1], tile)

    return Implementation(
        name,
        prepare,
        gate_gradient=False,
        head_first=True,
        eps=0.0 if rule is None else EPS,
        rule=rule,
        tiles_kept=all_tiles if rule is None else tiles_kept,
        missing=lambda device: None if device == "cuda" else "its backward pass needs a GPU",
    )


def _fla() -> Implementation:
    def prepare(inputs: Inputs) -> Attend:
        from fla.ops.forgetting_attn import parallel_forgetting_attn

        # It wants a gate for each query head.
        shared = inputs.q.shape[2] // inputs.log_f.shape[2]
        return lambda q, k, v, log_f: parallel_forgetting_attn(
            q, k, v, log_f.repeat_interleave(shared, dim=2) if shared > 1 else log_f, scale=inputs.scale
        )

    def missing(device: str) -> str | None:
        if find_spec("fla") is None:
            return "flash-linear-attention is not installed"
        return None if device == "cuda" else "needs a GPU"

    return Implementation("flash-linear-attention", prepare, missing=missing)


COMPETITORS = (
    _sdpa(CUDNN, SDPBackend.CUDNN_ATTENTION),
    _sdpa("FlashAttention-2 of torch, no gate", SDPBackend.FLASH_ATTENTION),
    _flex("FlexAttention + bias", None),
    _flex("FlexAttention + bias + ACP blocks", "paper"),
    _fla(),
)
