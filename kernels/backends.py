"""Where attention runs: in PyTorch, which is the definition, or on Triton kernels. `backend_of` chooses, once per call.

Everything that depends on the device is a function of a `Backend`. The modules that implement them do not choose
backends, and those in PyTorch import no Triton, which has no build for macOS and Windows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .decay import sum_gates
from .devices import capability_of
from .elementwise.attention_sink import add_sink
from .elementwise.gate_logits import gate_logits
from .elementwise.gated_norm import add_and_norm, gated_norm
from .elementwise.prologue import PrologueInputs
from .elementwise.silu_product import gated_linear, silu_product
from .pruning.key_stats import extend_summary
from .pruning.prune import search_kv_start
from .reference import backward_pass, forward_pass, reference_attention
from .tiles import LARGEST_HEAD_DIM

try:
    import triton
except ImportError:
    triton = None

HAS_TRITON = triton is not None

if HAS_TRITON:
    from .ahead_of_time import prepare_attention
    from .elementwise.triton_attention_sink import add_sink as triton_add_sink
    from .elementwise.triton_gate_logits import gate_logits as triton_gate_logits
    from .elementwise.triton_gated_norm import add_and_norm as triton_add_and_norm
    from .elementwise.triton_gated_norm import gated_norm as triton_gated_norm
    from .elementwise.triton_prologue import attention_prologue
    from .elementwise.triton_silu_product import silu_product as triton_silu_product
    from .portable.chunk_summary import extend_summary as triton_extend_summary
    from .portable.decode import can_decode, decode_attention
    from .portable.decode_append import append_tokens
    from .portable.page_table import move_pages
    from .portable.paged_chunk import take_chunk, write_chunk
    from .portable.scan import sum_gates as triton_sum_gates
    from .portable.small_linear import gated_linear as triton_gated_linear
    from .portable.small_linear import linear as triton_linear
    from .pruning.search import search_kv_start as triton_search_kv_start
    from .triton_attention import backward_pass as triton_backward_pass
    from .triton_attention import forward_pass as triton_forward_pass
    from .triton_attention import triton_attention
    from .triton_common import INTERPRETED

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Backend(NamedTuple):
    """The functions of one backend; a function has the same signature and contract in every backend.

    Attributes:
        prepare: called with the arguments of attention before the rest, which it may make ready for:
            `ahead_of_time.prepare_attention`.
        sum_gates: running sums of log gates, and the resets among them: `decay.sum_gates`.
        search_kv_start: the first key that pruning leaves to each query: `pruning.prune.search_kv_start`.
        attention: attention over a `Decay`, with autograd: `reference.reference_attention`.
        forward, backward: its two passes, for a caller that takes care of gradients: `reference.forward_pass` and
            `reference.backward_pass`.
        can_decode: whether `decode` supports the shapes: queries ``[B, Tq, H, D]`` and ``G`` key/value heads.
        decode: attention of few queries over a cache, without gradients: `portable.decode.decode_attention`; None if
            the backend has no decode kernel and `attention` is used instead.
        gated_norm: RMSNorm of the output of each head and the output gate: `elementwise.gated_norm.gated_norm`.
        add_and_norm: the residual connection and the norm after it: `elementwise.gated_norm.add_and_norm`.
        append: take the tokens of a decoding step into a layer's cache: `portable.decode_append.append_tokens`; None if
            the cache is to do so by operators of its own.
        take_chunk, write_chunk: take a chunk of a prompt into an evicting cache: `portable.paged_chunk.take_chunk` and
            `write_chunk`; None as above.
        extend_summary: take new tokens into what pruning knows of keys: `pruning.key_stats.extend_summary`.
        move_pages: give back and hand out pages of an evicting cache: `portable.page_table.move_pages`; None as above.
        add_sink: an attention sink beside the keys: `elementwise.attention_sink.add_sink`.
        silu_product: the activation of a gated MLP: `elementwise.silu_product.silu_product`.
        linear: a linear layer: `torch.nn.functional.linear`.
        gated_linear: two of them and the activation: `elementwise.silu_product.gated_linear`.
        gate_logits: logits of the forget gates: `elementwise.gate_logits.gate_logits`.
        prologue: token shift, QK-norm and RoPE at once: `elementwise.triton_prologue.attention_prologue`; it returns
            None where the modules of a model are to be called one by one, which define it.
    """

    prepare: Callable[..., None]
    sum_gates: Callable[..., tuple[Tensor, Tensor]]
    search_kv_start: Callable[..., Tensor]
    attention: Callable[..., tuple[Tensor, Tensor]]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    can_decode: Callable[[Tensor, int], bool]
    decode: Callable[..., tuple[Tensor, Tensor]] | None
    gated_norm: Callable[..., Tensor]
    add_and_norm: Callable[..., tuple[Tensor, Tensor]]
    append: Callable[..., tuple[Tensor, Tensor]] | None
    add_sink: Callable[..., tuple[Tensor, Tensor]]
    take_chunk: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] | None
    write_chunk: Callable[..., None] | None
    extend_summary: Callable[..., tuple[Tensor, Tensor]]
    move_pages: Callable[..., None] | None
    silu_product: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[..., Tensor]
    gated_linear: Callable[..., Tensor]
    gate_logits: Callable[..., Tensor]
    prologue: Callable[[PrologueInputs, float], tuple[Tensor, Tensor, Tensor] | None]


PYTORCH = Backend(
    prepare=lambda *inputs, **options: None,
    sum_gates=sum_gates,
    search_kv_start=search_kv_start,
    attention=reference_attention,
    forward=forward_pass,
    backward=backward_pass,
    can_decode=lambda q, kv_heads: False,
    decode=None,
    gated_norm=gated_norm,
    add_and_norm=add_and_norm,
    append=None,
    add_sink=add_sink,
    take_chunk=None,
    write_chunk=None,
    extend_summary=extend_summary,
    move_pages=None,
    silu_product=silu_product,
    linear=nn.functional.linear,
    gated_linear=gated_linear,
    gate_logits=gate_logits,
    prologue=lambda inputs, eps: None,
)
# Without Triton `backend_of` never returns it.
TRITON = PYTORCH
if HAS_TRITON:
    TRITON = Backend(
        prepare=prepare_attention,
        sum_gates=triton_sum_gates,
        search_kv_start=triton_search_kv_start,
        attention=triton_attention,
        forward=triton_forward_pass,
        backward=triton_backward_pass,
        can_decode=can_decode,
        decode=decode_attention,
        gated_norm=triton_gated_norm,
        add_and_norm=triton_add_and_norm,
        append=append_tokens,
        add_sink=triton_add_sink,
        take_chunk=take_chunk,
        write_chunk=write_chunk,
        extend_summary=triton_extend_summary,
        move_pages=move_pages,
        silu_product=triton_silu_product,
        linear=triton_linear,
        gated_linear=triton_gated_linear,
        gate_logits=triton_gate_logits,
        prologue=attention_prologue,
    )


def backend_of(q: Tensor) -> Backend:
    """The backend for queries ``q``, ``[..., D]``, or for keys of the same dtype, device and head dimension.

    `TRITON` for heads of up to 256 in float16, bfloat16 or float32, on an NVIDIA GPU of compute capability 8.0 or more
    or anywhere in Triton's interpreter, where Triton is installed; else `PYTORCH`.
    """
    return elementwise_backend_of(q) if q.shape[-1] <= LARGEST_HEAD_DIM else PYTORCH


def elementwise_backend_of(x: Tensor) -> Backend:
    """`backend_of` for what knows no heads: `gated_norm`, `silu_product`, `gate_logits` of ``x``, ``[..., size]``."""
    return TRITON if HAS_TRITON and x.dtype in _TRITON_DTYPES and _runs_triton(x) else PYTORCH


def _runs_triton(x: Tensor) -> bool:
    if INTERPRETED:
        return True
    capability = capability_of(x)
    return capability is not None and capability >= (8, 0)
