"""Attention of few queries over a long cache, as in decoding, by two launches: what counts is to read it once.

1. `decode_search` finds the blocks of 64 keys that each key/value head reads; pruned blocks are skipped there.
2. `decode_attend` attends to them.

Their grids depend on shapes alone, so that a CUDA graph can replay them while the sequence grows.
"""

import torch
from torch import Tensor

from ..decay import Decay
from ..devices import on_device_of
from ..operators import NAMESPACE, maybe_contiguous, nothing_sees
from ..pruning.key_stats import KeySummary
from ..pruning.rounding import log_allowed
from ..pruning.rules import Rule, check_logit_bound, check_rule
from ..tiles import LARGEST_DECODED_QUERIES, LARGEST_DECODED_ROWS
from .decode_attend import attend_blocks, choose_decode_tile
from .decode_search import DecodeInputs, DecodePruning, search_blocks


def can_decode(q: Tensor, kv_heads: int) -> bool:
    """Whether `decode_attention` takes queries ``q`` ``[B, Tq, H, D]`` over keys of ``kv_heads``: few enough."""
    queries, heads = q.shape[1:3]
    return queries <= LARGEST_DECODED_QUERIES and queries * (heads // kv_heads) <= LARGEST_DECODED_ROWS


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay,
    *,
    scale: float,
    real: Tensor | None = None,
    summary: KeySummary | None = None,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | None = None,
    sink: Tensor | None = None,
    pages: Tensor | None = None,
    start: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of few queries over ``decay``, without gradients, by GPU kernels that read each block kept once.

    As `reference_attention`, for what `can_decode` accepts. The cache is either dense, and may be longer than the
    sequence (keys after the last query's are not read), or paged: a page holds 64 tokens, of one key/value head or, if
    the table of pages has no dimension for heads, of all.

    Args:
        q: ``[B, Tq, H, D]`` queries; float16, bfloat16 or float32.
        k, v: ``[B, Tk, G, D]`` keys and values, or pools ``[P, 64, D]`` or ``[P, G, 64, D]`` of their pages; the dtype
            of ``q``.
        decay: running sums and visible range of each query; ``last`` may be of each sequence, ``[B, Tq]``. Over a paged
            cache, ``key`` is a pool ``[P, R, 64]`` of the ``R = max(1, Hf // G)`` gates of a page's key/value head, or
            of all: ``[P, Hf, 64]``.
        scale: multiplies ``q . k``.
        real: ``[B, Tk]`` bool, False for padding, which is hidden and may hold NaN; None if there is none.
        summary: of the keys; pruning needs it. Where heads share pages, pools of what holds at the end of each page:
            ``[P, Hf or G, 1]``.
        eps: with ``summary``, leave out keys of which it is proven that no row loses more than this of its attention
            weight in total, in ``(0, 1)``.
        rule: how that is proven, ``"tight"`` or ``"paper"``: see `pruning`. ``"measured"`` is taken as ``"tight"``.
        logit_bound: ``U`` of the rule ``paper``, a number, ``[H]`` or ``[B, H]``, as for `forgetting_attention`.
        sink: ``[G, D]`` key of an attention sink, which pruning is to know of; it is not attended to.
        pages: ``[B, G, N]`` or ``[B, N]`` int32 page of each block of 64 tokens; -1 where there is none. A row that
            must read such a block becomes NaN.
        start: ``[B, G]`` int32 first block that is still held; those before are not read.
        counts: ``[2]`` int64, to which are added, of all sequences and key/value heads, the blocks of 64 keys that are
            read and those that would be without pruning. None counts nothing.

    Returns:
        Output ``[B, Tq, H, D]`` in the dtype of ``q``, and log-sum-exp ``[B, H, Tq]`` float32; zero and -inf in fully
        masked rows.

    Raises:
        ValueError: ``eps``, ``rule`` or ``logit_bound`` is not as above, or ``paper`` lacks its bound.
    """
    known, log_eps, bound = None, 0.0, 0.0
    c = log_decays = largest = bounds = None
    if eps is not None:
        known = check_rule(eps, rule)
        check_logit_bound(logit_bound, q.shape[0], q.shape[2])
        if known.reads_bound and logit_bound is None:
            raise ValueError(f"logit_bound must be given for the rule {known.value!r}")
        log_eps = log_allowed(eps, torch.float32)
    if eps is not None and summary is not None:
        c, log_decays, largest = summary
        if isinstance(logit_bound, Tensor):
            bounds = logit_bound.expand(q.shape[0], q.shape[2])
        elif logit_bound is not None:
            bound = float(logit_bound)
    # The operator refuses to give gradients where they are wanted.
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, decay.query, decay.key))
    decode = _launch if not wanted and nothing_sees(q, k, v) else _decode
    return decode(
        q,
        k,
        v,
        decay.query,
        decay.key,
        decay.kv_start,
        decay.last,
        real,
        pages,
        start,
        c,
        log_decays,
        largest,
        bounds,
        sink,
        bound,
        scale,
        log_eps,
        None if known is None or summary is None else known.bound.value,
        counts,
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c_q: Tensor,
    c_k: Tensor,
    kv_start: Tensor,
    last: Tensor,
    real: Tensor | None,
    pages: Tensor | None,
    start: Tensor | None,
    c: Tensor | None,
    log_decays: Tensor | None,
    largest: Tensor | None,
    bounds: Tensor | None,
    sink: Tensor | None,
    bound: float,
    scale: float,
    log_eps: float,
    rule: str | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = _decode_fake(q)
    if q.numel() == 0:
        return out, lse
    q, k, v, c_q, c_k, kv_start = (maybe_contiguous(x) for x in (q, k, v, c_q, c_k, kv_start))
    pages = None if pages is None else pages.contiguous()
    inputs = DecodeInputs(q, k, v, c_q, c_k, kv_start, last, real, pages, start, counts)
    summary = None
    if c is not None and log_decays is not None and largest is not None:
        summary = KeySummary(c, log_decays, largest)
    sink = None if sink is None else sink.contiguous()
    pruning = DecodePruning(rule, log_eps, bound, bounds, summary, sink)
    with on_device_of(q):
        ranges = search_blocks(inputs, pruning, scale)
        attend_blocks(inputs, ranges, out, lse, scale, choose_decode_tile(inputs.rows, q.shape[3], q.dtype))
    return out, lse


# Not even `counts` is said to be changed: a graph would copy it, and nothing in one reads it.
_decode = torch.library.custom_op(f"{NAMESPACE}::decode_attention", _launch, mutates_args=())


@_decode.register_fake
def _decode_fake(q, *_):
    batch, queries, heads, _ = q.shape
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
