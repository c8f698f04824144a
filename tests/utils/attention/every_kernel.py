"""Run every GPU kernel once on small inputs: what `make sanitize` watches.

Both head sizes that have kernels of their own, one that has not; all types; padding, packing, fewer queries than keys,
pruning by each rule, sinks, dropout; gradients of everything. Decoding over a dense and over a paged cache, and chunks
of a prompt into the latter.

``--without-gluon`` leaves out the Gluon kernels. compute-sanitizer's racecheck does not follow an mbarrier's order from
thread to thread: it reports a race between a thread that reads a buffer and the one that writes it after an arrival on
the reader's behalf, also in a kernel of ten lines that does nothing else (docs/results/tuning.md).
"""

import sys
from typing import Any

import torch

from attention_inputs import attention, draw_inputs, draw_sink, forgetting_attention, padding_mask, with_sink
from foxlm import FoxConfig, FoxForCausalLM, FoxPagedCache
from foxlm.kernels import triton_attention
from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.elementwise.prologue import PrologueInputs
from foxlm.kernels.elementwise.triton_gate_logits import gate_logits
from foxlm.kernels.elementwise.triton_gated_norm import gated_norm
from foxlm.kernels.elementwise.triton_prologue import attention_prologue
from foxlm.kernels.elementwise.triton_silu_product import silu_product
from foxlm.kernels.portable.decode import decode_attention
from foxlm.kernels.portable.decode_append import append_tokens
from foxlm.kernels.pruning.key_stats import KeySummary, empty_summary


def main(gluon: bool) -> None:
    triton_attention.HAS_GLUON &= gluon
    for head_dim, dtype in ((64, torch.bfloat16), (128, torch.float16), (40, torch.bfloat16), (64, torch.float32)):
        for options, keys, queries in (
            ({"eps": 1e-3, "attention_mask": padding_mask("left", 2, 300).cuda()}, 300, 300),
            ({"eps": 1e-3, "rule": "paper", "dropout": 0.1}, 200, 130),
        ):
            inputs = draw_inputs(keys, queries, head_dim=head_dim, dtype=dtype)
            inputs = [x.detach().cuda().requires_grad_() for x in inputs]
            out = forgetting_attention(*inputs, **options)
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), inputs))
        inputs = [
            x.detach().cuda().requires_grad_() for x in draw_sink(draw_inputs(300, head_dim=head_dim, dtype=dtype))
        ]
        out, _ = with_sink(attention)(*inputs, eps=1e-3, rule="measured")
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), inputs))
    packed = [x.detach().cuda() for x in draw_inputs(300, batch=1, head_dim=64, dtype=torch.bfloat16)]
    forgetting_attention(*packed, cu_seqlens=torch.tensor([0, 70, 300], device="cuda"))
    for queries, heads in ((1, (2, 2, 2)), (3, (4, 2, 4))):
        decode(queries, heads)
        for paged in (False, True):
            append(queries, heads, paged)
    for head_dim, dtype in ((64, torch.bfloat16), (80, torch.float32)):
        x, gate = (torch.randn(2, 300, 3, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        weight = torch.ones(3 * head_dim, device="cuda", dtype=dtype, requires_grad=True)
        torch.autograd.grad(gated_norm(x, weight, 1e-6, gate.flatten(-2)).sum(), [x, weight, gate])
        torch.autograd.grad(gated_norm(x, weight, 1e-6).sum(), [x, weight])
        torch.autograd.grad(silu_product(x, gate).sum(), [x, gate])
        k = torch.randn_like(x, requires_grad=True)
        logits, angles = (torch.randn(2, 300, size, device="cuda", dtype=dtype) for size in (3, head_dim // 2))
        starts = torch.rand(2, 300, device="cuda") < 0.1
        prologue = PrologueInputs(x, k, k, logits, logits, None, None, weight, weight, angles, angles, starts)
        out = attention_prologue(prologue, 1e-6)
        assert out is not None
        torch.autograd.grad([y.sum() for y in out], [x, k, weight])
    weight, bias = torch.randn(12, 200, device="cuda"), torch.randn(12, device="cuda")
    with torch.no_grad():
        for tokens in (300, 3):
            gate_logits(torch.randn(2, tokens, 200, device="cuda", dtype=torch.float16), weight, bias)
        config = FoxConfig(vocab_size=32, hidden_size=128, num_attention_heads=2, num_hidden_layers=1)
        model, cache = FoxForCausalLM(config).eval().cuda().bfloat16(), FoxPagedCache(config, max_cache_len=1024)
        for _ in range(2):
            model(torch.randint(32, (1, 300), device="cuda"), cache=cache)
    print("every kernel ran")


def decode(queries: int, heads: tuple[int, int, int]) -> None:
    """One sequence of 320 tokens in a cache for 384, both ways."""
    drawn = draw_inputs(320, queries, batch=1, heads=heads, head_dim=64, dtype=torch.bfloat16)
    q, k, v, log_f = (x.detach().cuda() for x in drawn)
    c, first = accumulate(log_f)
    summary = KeySummary(
        c[..., 63::64].contiguous(),
        torch.logcumsumexp(-c, -1)[..., 63::64].contiguous(),
        k.float().norm(dim=-1).cummax(1).values.transpose(1, 2)[..., 63::64].contiguous(),
    )
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 64)) for x in (k, v))
    key = torch.nn.functional.pad(c, (0, 64))
    last = torch.arange(320 - queries, 320, device="cuda")
    decay = Decay(c[..., -queries:], key, first[..., -queries:], last)
    options: dict[str, Any] = {"scale": 0.125, "summary": summary, "eps": 1e-3}
    dense = decode_attention(q, k, v, decay, **options)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        """``[1, 384, G, D]`` as pages."""
        return x.unflatten(1, (6, 64)).permute(0, 3, 1, 2, 4).flatten(0, 2).contiguous()

    kv_heads = heads[1]
    pages = torch.arange(kv_heads * 6, dtype=torch.int32, device="cuda").view(1, kv_heads, 6)
    gates = key.unflatten(1, (kv_heads, -1)).unflatten(-1, (6, 64)).transpose(2, 3).flatten(0, 2).contiguous()
    paged = decode_attention(q, blocks(k), blocks(v), decay._replace(key=gates), pages=pages, **options)
    torch.testing.assert_close(paged, dense, rtol=1e-2, atol=1e-2)


def append(tokens: int, heads: tuple[int, int, int], paged: bool) -> None:
    """To a cache for 128 tokens that holds 62 of which nothing is known."""
    _, kv_heads, gates = heads
    drawn = draw_inputs(tokens, batch=1, heads=heads, head_dim=64, dtype=torch.bfloat16)
    _, k, v, log_f = (x.detach().cuda() for x in drawn)
    keys = torch.zeros(1, kv_heads, 128, 64, dtype=k.dtype, device="cuda")
    c = torch.zeros(1, gates, 128, dtype=torch.float64, device="cuda")
    last_c = torch.zeros_like(c[..., :64] if paged else c[..., 0])
    summary, running = empty_summary(c, keys, 128)
    options: dict[str, Any] = {"summary": summary, "running": running, "last": (last_c, last_c.long())}
    if paged:
        keys, c = keys.view(-1, 64, 64), c.new_zeros(2 * kv_heads, max(1, gates // kv_heads), 64)
        options["pages"] = torch.arange(2 * kv_heads, dtype=torch.int32, device="cuda").view(1, kv_heads, 2)
    for name, x in (("key", k), ("value", v)):
        options[f"{name}_states"] = x, x.new_zeros(1, 64 if paged else 1, kv_heads, 64)
    positions = torch.arange(62, 62 + tokens, device="cuda")
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    found = append_tokens(k, v, log_f, positions, keys=keys, values=keys.clone(), c=c, **options)
    before = torch.zeros(1, gates, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(found, accumulate(log_f, 62, (before, before.long())))


if __name__ == "__main__":
    main(gluon="--without-gluon" not in sys.argv)
