"""Hostile random inputs of forgetting attention, its definition in float64, and how far rounding may lead from it."""

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foxlm.kernels.decay import LOG_ZERO_GATE

# Of gates, each with how often it is drawn: the smallest numbers that are not zero, and both sides of a reset.
_GATES = [0.0, -0.0, -1e-45, -1e-6, -0.03, -1.0, -50.0, -1e4, -10001.0, -3e38, -math.inf]
_HOW_OFTEN = [6, 4, 1, 4, 8, 4, 1, 1, 1, 1, 1]
_ANYTHING = (math.nan, math.inf, -math.inf, 1e4)


class Case(NamedTuple):
    """Arguments of `forgetting_attention`, what they mean, and gradients of its results."""

    inputs: list[Tensor]
    options: dict[str, Any]
    real: Tensor
    sequence: Tensor
    cotangents: list[Tensor]

    def describe(self) -> str:
        shapes = [(list(x.shape), x.stride(), x.storage_offset()) for x in self.inputs]
        return f"{self.inputs[0].dtype}, {shapes}, {self.options}"


def draw_case(rng: random.Random, dtypes: list[torch.dtype], tokens: int, head_dims: list[int], device: str) -> Case:
    """One case of at most ``tokens`` keys."""
    dtype = rng.choice(dtypes)
    packed = rng.random() < 0.3
    batch = 1 if packed else rng.choice([0, 1, 1, 2, 3])
    keys = rng.choice([0, 1, 2, 3, 63, 64, 65, rng.randint(1, tokens), rng.randint(1, tokens)])
    queries = keys if rng.random() < 0.6 else rng.randint(0, keys)
    kv_heads, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
    heads, head_dim = kv_heads * group, rng.choice(head_dims)
    gates = rng.choice([1, kv_heads, heads])
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    size = rng.choice([0.0, 1e-3, 1.0, 1.0, 1.0, 8.0])
    q, k, v = (
        _relaid(rng, (torch.randn(batch, t, n, head_dim) * size).to(dtype))
        for t, n in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    weights = torch.tensor(_HOW_OFTEN, dtype=torch.float64) ** rng.choice([0.0, 1.0, 3.0])
    drawn = torch.multinomial(weights, max(1, batch * keys * gates), replacement=True)[: batch * keys * gates]
    log_f = torch.tensor(_GATES, dtype=rng.choice([wide, torch.float64]))[drawn].view(batch, keys, gates)
    if rng.random() < 0.3:
        log_f = log_f[:, :, :1].expand(-1, -1, gates)
    log_f = _relaid(rng, log_f)

    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["scale"] = rng.choice([0.0, -0.3, 1e-12, 30.0, -30.0, 1e4])
    real = torch.ones(batch, keys, dtype=torch.bool)
    if rng.random() < 0.5:
        share = rng.choice([0.0, 0.1, 0.5, 1.0])
        real = torch.rand(batch, keys) >= share
        if rng.random() < 0.4:
            real = real.sort(dim=1, descending=rng.random() < 0.5).values
        options["attention_mask"] = real.to(rng.choice([torch.bool, torch.int64, torch.uint8, torch.float32])).to(
            device
        )
        # Padding may hold anything.
        for x in (q, k, v, log_f):
            hidden = ~real[:, keys - x.shape[1] :, None].expand(*x.shape[:2], math.prod(x.shape[2:])).reshape(x.shape)
            x.copy_(torch.where(hidden, torch.tensor(rng.choice(_ANYTHING)).to(x.dtype), x))
    sequence = torch.zeros(keys, dtype=torch.int64)
    if packed:
        inner = sorted(rng.randint(0, keys) for _ in range(rng.choice([0, 1, 4])))
        offsets = torch.tensor([0, *inner, keys], dtype=rng.choice([torch.int32, torch.int64]))
        sequence = torch.bucketize(torch.arange(keys), offsets[1:].long(), right=True)
        options["cu_seqlens"] = offsets.to(device)
    if rng.random() < 0.3:
        options |= {"eps": rng.choice([5e-324, 1e-300, math.exp(-10.0), 0.1, 1.0 - 2.0**-53])}
        options |= {"rule": rng.choice(["paper", "tight"])}
    cotangents = [torch.randn(batch, queries, heads, head_dim).to(dtype), torch.randn(batch, heads, queries).to(wide)]
    if rng.random() < 0.3:
        # What the sum of a result has.
        cotangents = [torch.ones((), dtype=x.dtype).expand(x.shape) for x in cotangents]
    inputs = [x.to(device).requires_grad_() for x in (q, k, v, log_f)]
    return Case(inputs, options, real, sequence, [x.to(device) for x in cotangents])


def _relaid(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers elsewhere in memory; its own to write to."""
    kind = rng.choice(["contiguous", "heads first", "every other", "misaligned", "part of more"])
    shape = list(x.shape)
    if kind == "heads first":
        return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    if kind == "every other":
        y = x.new_empty([*shape[:-1], 2 * shape[-1]])[..., ::2]
    elif kind == "misaligned":
        y = x.new_empty(x.numel() + 1)[1:].view(shape)
    elif kind == "part of more":
        y = x.new_empty([shape[0], shape[1] + 2, *shape[2:]])[:, 1:-1]
    else:
        y = x.new_empty(shape)
    return y.copy_(x)


def expected_results(
    case: Case, u: float, u_products: float, floor: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output, log-sum-exp and gradients by the definition in float64, and how much each may differ from them.

    The bound: each attention weight has a relative error of a few ``u`` times the size of the terms of its logit, by
    the first order of exp, and a normalizer the mean of those; the rest are the sums of products that the formulas in
    `foxlm.kernels.reference` are, each term with its error.

    Args:
        case: drawn before.
        u: unit roundoff of scores and sums.
        u_products: that of weights and of their gradients as they enter products.
        floor: weights and their gradients below may vanish.

    Returns:
        By name as `output_and_gradients`. Bounds are infinite where the first order does not tell.
    """
    queries, heads, head_dim = case.inputs[0].shape[1:]
    keys, kv_heads = case.inputs[1].shape[1:3]
    scale = case.options.get("scale", head_dim**-0.5)
    real, asked = case.real, case.real[:, keys - queries :]
    kept = (asked, real, real, real)
    leaves = [x.detach().cpu().double() for x in case.inputs]
    leaves = [x.masked_fill(~m.view(*m.shape, *[1] * (x.ndim - 2)), 0.0) for x, m in zip(leaves, kept, strict=True)]
    q, k, v, log_f = (x.requires_grad_() for x in leaves)

    i, j = torch.arange(keys - queries, keys), torch.arange(keys)
    between = ((j[None, :, None] < j) & (j <= i[:, None, None])).double()
    resets = log_f.detach() < LOG_ZERO_GATE
    decay = torch.einsum("ijl,blh->bhij", between, log_f.masked_fill(resets | ~real[..., None], 0.0))
    visible = torch.einsum("ijl,blh->bhij", between, resets.double()) == 0.0
    visible = visible & (j <= i[:, None]) & (case.sequence == case.sequence[i][:, None])
    visible = visible & asked[:, None, :, None] & real[:, None, None, :]
    decay, visible = (_per_head(x, heads, 1) for x in (decay, visible))
    many_k, many_v = (_per_head(x, heads, 2) for x in (k, v))
    sees = visible.any(-1, keepdim=True)
    logits = scale * torch.einsum("bihd,bjhd->bhij", q, many_k) + decay
    logits = torch.where(visible, logits, -math.inf)
    weights = torch.where(sees, torch.where(sees, logits, 0.0).softmax(-1), 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, many_v)
    lse = torch.where(sees, torch.where(sees, logits, 0.0).logsumexp(-1, keepdim=True), -math.inf)[..., 0]
    d_out, d_lse = (x.cpu().double() for x in case.cotangents)
    gradients = torch.autograd.grad([out, lse], [q, k, v, log_f], [d_out, d_lse], materialize_grads=True)
    names = ("out", "lse", "dq", "dk", "dv", "dlog_f")
    exact = dict(zip(names, (out.detach(), lse.detach(), *gradients), strict=True))

    with torch.no_grad():
        p, lse = weights.detach(), exact["lse"].masked_fill(~sees[..., 0], 0.0)
        size = torch.einsum("bihd,bjhd->bhij", q.abs(), many_k.abs()) * abs(scale) * 4 + decay.abs() + 16.0
        size = torch.where(visible, size, 0.0)
        error = 4.0 * u * (size + (p * size).sum(-1, keepdim=True) + lse.abs()[..., None])
        # A decay is a difference of running sums in float64.
        sums = log_f.masked_fill(resets, 0.0).sum(1)[..., None, None]
        error += 32.0 * 2.0**-53 * _per_head(sums, heads, 1).abs()
        error_p = p * error + floor
        size_dp = torch.einsum("bihd,bjhd->bhij", d_out.abs(), many_v.abs())
        size_ds = size_dp + (p * size_dp).sum(-1, keepdim=True) + d_lse.abs()[..., None]
        error_ds = p * ((error + 8.0 * u_products + 8.0 * u) * size_ds + (error_p * size_dp).sum(-1, keepdim=True))
        error_ds += floor * (1.0 + size_ds)
        error_pv = error_p + 4.0 * u_products * p
        per_kv = [kv_heads, heads // kv_heads]
        gates = log_f.shape[2]
        bounds = {
            "out": torch.einsum("bhij,bjhd->bihd", error_pv, many_v.abs()),
            "lse": (p * error).sum(-1) + 4.0 * u * lse.abs() + 4.0 * u,
            "dq": abs(scale) * torch.einsum("bhij,bjhd->bihd", error_ds, many_k.abs()),
            "dk": abs(scale) * torch.einsum("bhij,bihd->bjhd", error_ds, q.abs()).unflatten(2, per_kv).sum(3),
            "dv": torch.einsum("bhij,bihd->bjhd", error_pv, d_out.abs()).unflatten(2, per_kv).sum(3),
            "dlog_f": torch.einsum("bhij,ijl->blh", error_ds, between).unflatten(2, [gates, -1]).sum(3),
        }
        # It is a difference of sums over all later tokens, in float64; kernels round its two sides apart.
        later = 16.0 * 2.0**-53 * (p * size_ds).sum((2, 3)) if u_products <= u else error_ds.sum((2, 3))
        bounds["dlog_f"] += later.unflatten(1, [gates, -1]).sum(2)[:, None]
        unknown = bool(((error > 0.1) & (p > 1e-300)).any())
        for name, x in bounds.items():
            like = case.inputs[0] if name != "dlog_f" else case.inputs[3]
            info = torch.finfo(like.dtype if name != "lse" else case.cotangents[1].dtype)
            x += exact[name].abs().nan_to_num(posinf=0.0) * info.eps * 2.0 + info.tiny * 2.0
            if unknown:
                x.fill_(math.inf)
    return exact, bounds


def _per_head(x: Tensor, heads: int, dim: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[dim], dim=dim)
