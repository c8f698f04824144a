"""Every kernel compiles for every supported architecture, on a machine without a GPU, and fits it."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_inputs import attention, draw_inputs, draw_sink, output_and_gradients, with_sink
from foxlm.kernels import backends
from foxlm.kernels.backends import HAS_TRITON
from foxlm.kernels.decay import Decay
from foxlm.kernels.pruning.key_stats import KeySummary, empty_summary
from foxlm.kernels.pruning.later_queries import QueriesToCome
from foxlm.kernels.pruning.rules import PruningRule
from foxlm.kernels.tiles import Tiles, choose_tiles
from kernel_device import INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton

from ahead_of_time import compiling_only
from foxlm.kernels import triton_attention
from foxlm.kernels.context_parallel.kernels import (
    carry_gates,
    copy_rows,
    find_needs,
    window_kv_start,
)
from foxlm.kernels.context_parallel.partition import NAMED_SPLITS, TokenSplit, split_tables
from foxlm.kernels.context_parallel.row_copy import Place, Rows, Runs
from foxlm.kernels.elementwise.prologue import PrologueInputs
from foxlm.kernels.elementwise.triton_attention_sink import add_sink
from foxlm.kernels.elementwise.triton_gate_logits import gate_logits
from foxlm.kernels.elementwise.triton_gated_norm import gated_norm
from foxlm.kernels.elementwise.triton_prologue import attention_prologue
from foxlm.kernels.elementwise.triton_silu_product import silu_product
from foxlm.kernels.portable.chunk_summary import extend_summary
from foxlm.kernels.portable.decode import decode_attention
from foxlm.kernels.portable.decode_append import append_tokens
from foxlm.kernels.portable.page_table import move_pages
from foxlm.kernels.portable.paged_chunk import Recent, take_chunk, write_chunk
from foxlm.kernels.portable.small_linear import gated_linear, linear

# Shared memory that one program can have, in KiB.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
# `make test` compiles for Hopper, `make test-slow` for the others.
ARCHITECTURES = [pytest.param(x, marks=[] if x == 90 else pytest.mark.slow) for x in SHARED_MEMORY]
# Registers of all threads of a program.
REGISTERS = 65536
# Bytes that a thread may keep in memory for want of registers. Above, smaller tiles would be faster.
STACK = 2048
# Architecture, head size and type.
CASES = [
    *((capability, head_dim, torch.bfloat16) for capability in SHARED_MEMORY for head_dim in (64, 128)),
    (86, 40, torch.float16),
    (86, 128, torch.float32),
    (90, 256, torch.bfloat16),
]
KERNELS = {
    "_gate_totals_kernel",
    "_gate_scan_kernel",
    "_summary_kernel",
    "_join_kernel",
    "_search_kernel",
    "_measure_kernel",
    "_describe_blocks_kernel",
    "_head_order_kernel",
    "_forward_kernel",
    "_query_range_kernel",
    "_maxima_kernel",
    "_running_maxima_kernel",
    "_backward_rows_kernel",
    "backward_kernel",
    "backward_finish_kernel",
    "_gradient_totals_kernel",
    "_gradient_scan_kernel",
}


def compile_for(
    capability: int, tiles: Tiles, inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """The kernels that forward and backward launch, by name; with a sink if ``inputs`` have one."""
    monkeypatch.setattr(backends, "_runs_triton", lambda x: True)
    monkeypatch.setattr(triton_attention, "_tiles", lambda q: tiles)
    with compiling_only(capability) as compiled:
        output_and_gradients(attention if len(inputs) == 4 else with_sink(attention), inputs, **options)
    return {kernel.metadata.name: kernel for kernel in compiled}


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers of a thread, ``REG``, and what did not fit in them, ``STACK`` in bytes."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def check_waits(kernel: Any) -> None:
    """A kernel that may begin before the one before it has ended reads and writes nothing before it has waited."""
    ptx = kernel.asm["ptx"]
    assert ("griddepcontrol" in ptx) == kernel.metadata.launch_pdl, kernel.metadata.name
    if kernel.metadata.launch_pdl:
        assert kernel.metadata.target.arch >= 90
        begun = ptx.index("griddepcontrol.wait")
        assert begun < ptx.index("griddepcontrol.launch_dependents")
        assert not re.search(r"\b(ld|st|atom|red)\.(\w+\.)*global", ptx[:begun]), kernel.metadata.name


def check_registers(kernels: Iterable[Any], capability: int, folder: Path) -> None:
    """What a program needs fits into registers, and nothing of it into memory."""
    for kernel in kernels:
        check_waits(kernel)
        assert kernel.metadata.target.arch == capability
        used = resources(kernel, folder)
        assert used["REG"] * 32 * kernel.metadata.num_warps <= REGISTERS
        assert used["STACK"] == 0, kernel.metadata.name


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [pytest.param(*case, marks=[] if case[0] == 90 else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_kernels_fit(capability, head_dim, dtype, monkeypatch, tmp_path):
    inputs = draw_inputs(300, batch=1, heads=(2, 1, 2), head_dim=head_dim, dtype=dtype)
    tiles = choose_tiles(head_dim, dtype, (capability // 10, capability % 10))
    kernels = compile_for(capability, tiles, draw_sink(inputs), monkeypatch, eps=1e-3, rule="measured")
    assert set(kernels) == KERNELS | {"_sink_kernel", "_sink_backward_kernel"}
    for name, kernel in kernels.items():
        assert kernel.metadata.target.arch == capability
        assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024, name
        used = resources(kernel, tmp_path)
        assert used["REG"] * 32 * kernel.metadata.num_warps <= REGISTERS, name
        assert used["STACK"] <= STACK, f"{name}: {used}"


def compile_decoding_for(
    capability: int, head_dim: int, dtype: torch.dtype, heads: tuple[int, int, int], paged: bool, **options: Any
) -> list[Any]:
    """The kernels that `decode_attention` launches."""
    (h, g, hf), keys, blocks = heads, 1024, 16

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    summary = KeySummary(empty(2, hf, blocks), empty(2, hf, blocks), empty(2, g, blocks, dtype=torch.float32))
    first, last = torch.zeros(2, hf, 1, dtype=torch.int64), torch.tensor([keys - 1])
    if paged:
        k = empty(2 * g * blocks, 64, head_dim, dtype=dtype)
        key = empty(2 * g * blocks, max(1, hf // g), 64)
        options |= {"pages": empty(2, g, blocks, dtype=torch.int32), "start": empty(2, g, dtype=torch.int32)}
    else:
        k, key = empty(2, keys, g, head_dim, dtype=dtype), empty(2, hf, keys)
        options |= {"real": empty(2, keys, dtype=torch.bool)}
    decay_of = Decay(empty(2, hf, 1), key, first, last)
    with compiling_only(capability) as compiled:
        q = empty(2, 1, h, head_dim, dtype=dtype)
        decode_attention(q, k, k, decay_of, scale=0.125, summary=summary, eps=1e-3, **options)
    return compiled


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoding_fits(dtype, head_dim, capability, tmp_path):
    cases: list[tuple[tuple[int, int, int], bool, dict[str, Any]]] = [
        ((2, 2, 2), False, {}),
        ((8, 2, 8), True, {"rule": "paper", "logit_bound": 8.0}),
        ((8, 2, 8), False, {"sink": torch.empty(2, head_dim, dtype=dtype)}),
    ]
    for heads, paged, options in cases:
        kernels = compile_decoding_for(capability, head_dim, dtype, heads, paged, **options)
        assert [kernel.metadata.name for kernel in kernels] == ["_decode_search_kernel", "_decode_attend_kernel"]
        for kernel in kernels:
            assert kernel.metadata.target.arch == capability
            check_waits(kernel)
            assert kernel.metadata.shared <= SHARED_MEMORY[capability] * 1024
            used = resources(kernel, tmp_path)
            assert used["REG"] * 32 * kernel.metadata.num_warps <= REGISTERS
            assert used["STACK"] <= STACK, f"{heads}: {used}"


def append_to_a_cache(room: int, tokens: int, head_dim: int, dtype: torch.dtype, paged: bool) -> None:
    """With a gate for each of two key/value heads, and token shift; with padding, if dense."""
    k = torch.empty(2, tokens, 4, head_dim, dtype=dtype).transpose(1, 2)[:, 2:]
    c = torch.empty(2, 2, room, dtype=torch.float64)
    keys, ring = torch.empty(2, 2, room, head_dim, dtype=dtype), c[..., 0].clone()
    options: dict[str, Any] = {"real": torch.empty(2, tokens, dtype=torch.bool)}
    options["last_real"] = torch.zeros(2, 1 + tokens, dtype=torch.int64)
    if paged:
        keys, c, ring = keys.view(-1, 64, head_dim), c.view(-1, 1, 64), torch.empty(2, 2, 64, dtype=torch.float64)
        options = {"pages": torch.empty(2, 2, room // 64, dtype=torch.int32)}
    summary, running = empty_summary(ring, k, room)
    options |= {"keys": keys, "values": keys, "c": c, "last": (ring, ring.long()), "summary": summary}
    held = torch.empty(2, 64 if paged else 1, 2, head_dim, dtype=dtype)
    options |= {"key_states": (k.transpose(1, 2), held), "value_states": (k.transpose(1, 2), held)}
    log_f, positions = torch.empty(2, tokens, 2), torch.arange(1 + tokens)[1:]
    append_tokens(k, k, log_f, positions, running=running, length=torch.tensor(0), **options)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(40, torch.bfloat16), (256, torch.float32)], ids=str)
def test_appending_fits_and_compiles_once_for_caches_of_all_lengths(dtype, head_dim, capability, tmp_path):
    for tokens, paged in ((1, False), (16, True)):
        with compiling_only(capability) as kernels:
            for room in (1024, 64, 3200) if paged else (1024, 1000, 1001):
                append_to_a_cache(room, tokens, head_dim, dtype, paged)
            append_to_a_cache(1024, max(2, tokens - 3), head_dim, dtype, paged)
        kernel, *others, fewer_tokens = kernels
        assert all(x is kernel for x in others)
        assert (fewer_tokens is kernel) == (tokens > 1)
        assert kernel.metadata.name == "_decode_append_kernel" and kernel.metadata.target.arch == capability
        used = resources(kernel, tmp_path)
        assert used["REG"] * 32 * kernel.metadata.num_warps <= REGISTERS
        assert used["STACK"] <= 64, used
        assert "__assertfail" in kernel.asm["ptx"]
        check_waits(kernel)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_between_ranks_fit(dtype, capability, tmp_path):
    split = TokenSplit(1024, 2, NAMED_SPLITS["zigzag"](1024, 2))
    tables = split_tables(split, 0, torch.device("cpu"))
    shards: Any = SimpleNamespace(
        split=split, segments=split.of(0), tables=lambda _: tables, gather=lambda x: x.new_empty(2, *x.shape)
    )
    first = torch.zeros(1, 4, 512, dtype=torch.int64)
    keys = torch.zeros(1, 512, 2, 96, dtype=dtype)
    rows = Rows(keys, keys.clone(), torch.zeros(1, 512, 2, 1, dtype=torch.float64))
    runs = Runs.between(Place(0, np.arange(2), 0), Place(0, 0, 1), 5)
    with compiling_only(capability) as kernels:
        _, crossing = find_needs(first, 2, shards)
        carry_gates(first.double(), first, shards)
        window_kv_start(first, 64, 512, torch.arange(2), None, 0)
        window_kv_start(first, 0, 512, None, crossing[0], 128)
        for add in (False, True):
            copy_rows(rows, rows, runs._replace(device=torch.from_numpy(runs.table)), add=add)
    names = ["needs", "ends", "carry", "window", "window", "copy", "copy"]
    assert [kernel.metadata.name for kernel in kernels] == [f"_{name}_kernel" for name in names]
    check_registers(kernels, capability, tmp_path)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_elementwise_kernels_fit_and_compile_once(dtype, head_dim, capability, tmp_path):
    """One for each pass, whatever the number of tokens."""
    weight = torch.ones(3 * head_dim, dtype=dtype)
    with compiling_only(capability) as compiled:
        for tokens in (1, 16, 300, 4096):
            x = torch.empty(2, tokens, 3, head_dim, dtype=dtype, requires_grad=True)
            gate = torch.empty(2, tokens, 4 * head_dim * 3, dtype=dtype)[..., head_dim * 3 : head_dim * 6]
            out = gated_norm(x, weight, 1e-6, gate, "silu")
            torch.autograd.grad(out, x, torch.empty_like(out))
            out = silu_product(x.flatten(-2), gate)
            torch.autograd.grad(out, x, torch.empty_like(out))
            lse, sink = torch.empty(2, 3, tokens), torch.empty(3, head_dim, dtype=dtype)
            out, lse = add_sink(x, lse, x, sink, sink, 0.125)
            torch.autograd.grad(out, x, torch.empty_like(out))
    kernels = {kernel.hash: kernel for kernel in compiled}.values()
    launched = ("gated_norm", "silu_product", "sink")
    names = {f"_{name}{backward}_kernel" for name in launched for backward in ("", "_backward")}
    assert {kernel.metadata.name for kernel in kernels} == names
    assert len(kernels) == len(names)
    check_registers(kernels, capability, tmp_path)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prologue_fits_and_compiles_once(dtype, head_dim, capability, tmp_path):
    """One kernel for each pass, whatever the number of tokens."""
    with compiling_only(capability) as compiled:
        for batch, tokens in ((1, 1), (2, 16), (3, 300), (1, 4097)):
            q, k, v = (torch.empty(batch, tokens, x, head_dim, dtype=dtype, requires_grad=True) for x in (6, 3, 3))
            logits, angles = (torch.empty(batch, tokens, x, dtype=dtype) for x in (3, head_dim // 2))
            weights = torch.ones(6 * head_dim), torch.ones(3 * head_dim)
            starts = torch.zeros(batch, tokens, dtype=torch.bool)
            inputs = PrologueInputs(q, k, v, logits, logits, None, None, *weights, angles[:1], angles[:1], starts)
            out = attention_prologue(inputs, 1e-6)
            assert out is not None
            torch.autograd.grad(out, (q, k, v), [torch.empty_like(x) for x in out])
    kernels = {kernel.hash: kernel for kernel in compiled}.values()
    assert {kernel.metadata.name for kernel in kernels} == {"prologue_forward_kernel", "prologue_backward_kernel"}
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.metadata.target.arch == capability
        used = resources(kernel, tmp_path)
        assert used["REG"] * 32 * kernel.metadata.num_warps <= REGISTERS
        assert used["STACK"] <= STACK, f"{kernel.metadata.name}: {used}"


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shifted", [(), ("key",), ("value",), ("key", "value")], ids=str)
def test_prologue_compiles_for_what_a_model_has(shifted, norm, rotated):
    """The interpreter never enters a branch for heads that are not there; the compiler does."""
    if not (shifted or norm or rotated):
        return
    q, k, v = (torch.empty(2, 16, x, 32, dtype=torch.bfloat16, requires_grad=True) for x in (6, 3, 3))
    logits, angles = torch.empty(2, 16, 3, dtype=torch.bfloat16), torch.empty(1, 16, 32, dtype=torch.bfloat16)
    inputs = PrologueInputs(
        q, k, v,
        key_logits=logits if "key" in shifted else None,
        value_logits=logits if "value" in shifted else None,
        q_weight=torch.ones(32) if norm else None,
        k_weight=torch.ones(32) if norm else None,
        cos=angles if rotated else None,
        sin=angles if rotated else None,
    )  # fmt: skip
    with compiling_only(90) as compiled:
        out = attention_prologue(inputs, 1e-6)
        assert out is not None
        torch.autograd.grad(out, (q, k, v), [torch.empty_like(x) for x in out])
        # Of the token before the first, of several by slot, and of the one before each.
        slot = torch.zeros(1, dtype=torch.int64)
        for shape, past_slot in (((2, 3, 32), None), ((2, 4, 3, 32), slot), ((2, 16, 3, 32), None)):
            past = torch.empty(shape, dtype=torch.bfloat16)
            held = {f"{name}_past": past for name in shifted}
            with torch.no_grad():
                assert attention_prologue(inputs._replace(**held, past_slot=past_slot), 1e-6) is not None
    assert {kernel.metadata.name for kernel in compiled} == {"prologue_forward_kernel", "prologue_backward_kernel"}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_gate_logits_fit_and_compile_once(capability, tmp_path):
    with compiling_only(capability) as compiled, torch.no_grad():
        for tokens in (1, 8, 64, 300, 4097):
            inputs = torch.empty(1, tokens, 1536, dtype=torch.bfloat16), torch.empty(24, 1536), torch.empty(24)
            gate_logits(*inputs)
            gate_logits(*inputs, log_sigmoid=True)
    kernels = {kernel.hash: kernel for kernel in compiled}.values()
    # One for few tokens, one for many; each with and without the activation.
    assert len(kernels) == 4
    check_registers(kernels, capability, tmp_path)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_linear_layers_of_one_row_fit_and_compile_once(capability, tmp_path):
    with compiling_only(capability) as compiled, torch.no_grad():
        for size, features in ((1536, 6208), (1536, 1536), (4096, 1536)):
            x, weight = torch.empty(1, 1, size, dtype=torch.bfloat16), torch.empty(features, size, dtype=torch.bfloat16)
            linear(x, weight)
            gated_linear(x, weight)
    kernels = {kernel.hash: kernel for kernel in compiled}.values()
    assert len(kernels) == 2
    check_registers(kernels, capability, tmp_path)


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(("heads", "gates", "head_dim"), [(4, 4, 64), (4, 1, 128), (8, 8, 80)])
def test_chunks_of_an_evicting_cache_fit_and_compile_once(heads, gates, head_dim, capability, tmp_path):
    """Once for the first chunk of a prompt, which reads no pages, and once for all others."""
    rows = max(1, gates // 4)
    pools: dict[str, Any] = dict(
        keys=torch.empty(9, 64, head_dim, dtype=torch.bfloat16), sums=torch.empty(9, rows, 64).double()
    )
    pools |= dict(values=pools["keys"], pages=torch.zeros(2, 4, 130, dtype=torch.int32))
    norm, diagonal = torch.empty(2, heads, 1).double().unbind()
    to_come = QueriesToCome(PruningRule.TIGHT, 1e-3, norm, diagonal, token=64, most_keys=8192)
    with compiling_only(capability) as compiled:
        for past, tokens in ((0, 300), (0, 1024), (300, 211), (511, 1), (1024, 4096)):
            k = torch.empty(2, tokens, 4, head_dim, dtype=torch.bfloat16).transpose(1, 2)
            c = torch.empty(2, gates, tokens).double()
            summary, running = empty_summary(c, k, 130 * 64)
            statistics: dict[str, Any] = dict(summary=summary, running=running, to_come=to_come)
            first, states = torch.empty(2, gates, tokens, dtype=torch.int64), k.transpose(1, 2)
            rings = torch.empty(2, gates, 64).double(), torch.empty(2, gates, 64, dtype=torch.int64)
            unshifted = (states, torch.empty(2, 64, 4, head_dim, dtype=torch.bfloat16))
            statistics |= dict(first=first, start=torch.zeros(2, 4, dtype=torch.int32))
            extend_summary(summary, running, c, k, past)
            all_k, _, all_c, shown, start = take_chunk(k, k, c, past, **pools, **statistics)
            assert shown.shape == (2, max(4, gates), tokens)
            assert all_k.shape == (2, 4, past + tokens, head_dim) and all_c.shape == (2, gates, past + tokens)
            assert start is not None and start.shape == (2, 4)
            recent = Recent(*rings, *unshifted, *unshifted) if past else Recent()
            write_chunk(k, k, c, past, first=first, recent=recent, **pools)
            table, counts = (pools["pages"], statistics["start"]), torch.empty(2, dtype=torch.int32)
            sizes: dict[str, Any] = dict(n_free=past, n_pages=9, used=130, blocks=1 + tokens // 64)
            move_pages(*table, start, torch.empty(9 + past).int(), counts, **sizes)
    kernels = {kernel.hash: kernel for kernel in compiled}.values()
    names = [kernel.metadata.name for kernel in kernels]
    chunk = [f"_{x}_chunk_kernel" for x in ("read", "read", "summarize", "write", "write")]
    assert sorted(names) == sorted([*chunk, "join_chunk_kernel", "join_chunk_kernel", "_move_pages_kernel"])
    check_registers(kernels, capability, tmp_path)


def test_dropout_and_packing_compile(monkeypatch):
    inputs = draw_inputs(300, batch=1, heads=(2, 1, 2), head_dim=64, dtype=torch.bfloat16)
    tiles = choose_tiles(64, torch.bfloat16, (9, 0))
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 100, 300]), "dropout": 0.1, "eps": 1e-3, "rule": "paper"}
    kernels = compile_for(90, tiles, inputs, monkeypatch, **options, logit_bound=10.0)
    assert set(kernels) == KERNELS - {"_summary_kernel", "_measure_kernel"} | {"_block_decay_kernel"}


def test_tiles_that_do_not_fit_are_seen(monkeypatch):
    """Negative control: the tiles of an H100 need more than an A10 has."""
    inputs = draw_inputs(300, batch=1, heads=(2, 1, 2), head_dim=128, dtype=torch.bfloat16)
    kernels = compile_for(86, choose_tiles(128, torch.bfloat16, (9, 0)), inputs, monkeypatch)
    assert max(kernel.metadata.shared for kernel in kernels.values()) > SHARED_MEMORY[86] * 1024
