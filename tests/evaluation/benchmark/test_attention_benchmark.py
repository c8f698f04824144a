"""`foxlm bench attention`: its inputs, what it compares, and what it refuses to time."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmark_rows import rows_of
from foxlm import FoxForCausalLM, forgetting_attention
from foxlm.evaluation.benchmark.attention import implementations
from foxlm.evaluation.benchmark.attention.correctness import Sample, attend_densely
from foxlm.evaluation.benchmark.attention.implementations import BASELINES, OURS, Implementation, chosen, defined_tiles
from foxlm.evaluation.benchmark.attention.inputs import Case, Inputs, make_inputs, record_inputs
from foxlm.evaluation.benchmark.attention.measured import synthetic, variants
from foxlm.evaluation.benchmark.models import Workload, spread_decay_times
from foxlm.evaluation.benchmark.runner import MissingError
from foxlm.evaluation.gates import RULES
from foxlm.evaluation.recording import AttentionInputs, record_attention
from models import tiny_config
from naive import naive_attention

CASE = Case(2, 4, 16, 300)


def inputs_of(case: Case = CASE, dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(case, "cpu", dtype, seed=0)


def measured(implementation: Implementation, inputs: Inputs | None = None) -> dict[str, Any]:
    inputs = inputs_of() if inputs is None else inputs
    _, row = rows_of(variants(CASE, inputs, [implementation]))
    return row


def ours(rule: str | None) -> Implementation:
    return next(one for one in OURS if one.rule == rule)


# Inputs


def test_a_fifth_of_the_heads_forgets_slowly() -> None:
    for heads, slow in ((4, 1), (12, 2), (24, 4)):
        times = spread_decay_times(heads)
        assert times.equal(times.sort().values)
        assert ((times > 1) & (times < 100)).sum() == heads - slow
        assert ((times > 1e3) & (times < 1e6)).sum() == slow


def test_inputs_are_normalized_forget_at_their_pace_and_repeat() -> None:
    inputs, again = inputs_of(), inputs_of()
    layer = inputs.layer
    assert all(torch.equal(x, y) for x, y in zip(layer[1:5], again.layer[1:5], strict=True))
    largest = layer.scale * layer.q.norm(dim=-1).max() * layer.k.norm(dim=-1).max()
    assert isinstance(layer.logit_bound, Tensor)
    assert largest.item() == pytest.approx(layer.logit_bound.max().item(), rel=1e-4)
    # The mean of exp(0.5 n) is exp(1 / 8).
    pace = -layer.log_f.double().mean((0, 1)) * spread_decay_times(CASE.heads)
    torch.testing.assert_close(pace, torch.full_like(pace, math.exp(0.125)), rtol=0.1, atol=0.0)
    assert inputs.open().layer.log_f.abs().max() == 0.0


def test_pruning_keeps_what_was_published_for_such_gates() -> None:
    """The published tables drew other gates from the same distribution."""
    inputs = inputs_of(Case(1, 24, 64, 4096))
    for rule, published in zip(RULES, (0.402, 0.361), strict=True):
        assert defined_tiles(inputs.layer, rule) == pytest.approx(published, abs=0.05)


def test_case_is_read_and_counted() -> None:
    case = Case.parse("2x3x8x10")
    assert (case, str(case)) == (Case(2, 3, 8, 10), "2x3x8x10")
    # Two matmuls of 2 T^2 D operations for each of six heads, half of them causal.
    assert case.flops(backward=False) == 6 * 2 * (2 * 100 * 8) / 2
    assert case.flops(backward=True) == 3.5 * case.flops(backward=False)
    for text in ("2x3x8", "2x3x8x0", "2x3x8x10x1", "axbxcxd", ""):
        with pytest.raises(ValueError, match=r"--case must be four positive integers BxHxDxT such as .*, got '"):
            Case.parse(text)


@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates", "multi-query", "rope"])
def test_attention_of_a_model_is_what_enters_it(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FoxForCausalLM(tiny_config(variant, initializer_range=0.2)).save_pretrained(tmp_path / "mine")
    text = tmp_path / "text.npy"
    np.save(text, np.random.default_rng(0).integers(2, 97, 900))
    workload = Workload("cpu", model=str(tmp_path / "mine"), text=text)
    case, inputs, facts = record_inputs(workload, 2, 160, torch.float32)
    layer, kv_heads = inputs.layer, 1 if variant == "multi-query" else 2
    assert case == Case(4, 4, 8, 160, kv_heads) and layer.k.shape == (4, 160, kv_heads, 8)
    assert facts["model"] == "mine" and facts["text"] == "text.npy"
    fox = FoxForCausalLM.from_pretrained(tmp_path / "mine")
    ids = torch.from_numpy(np.load(text)[:320].reshape(2, 160))
    with torch.no_grad(), record_attention(fox) as layers:
        fox.model(ids, use_cache=False)
    torch.testing.assert_close(layer.q, torch.cat([one.q for one in layers]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.log_f, torch.cat([one.log_f for one in layers]), rtol=1e-4, atol=1e-4)
    assert layer.centers == (variant == "llama") == (layer.logit_bound is None)
    if isinstance(layer.logit_bound, Tensor):
        bounds = [fox.model.layers[n // 2].self_attn.logit_bound(torch.float32).expand(4) for n in range(4)]
        torch.testing.assert_close(layer.logit_bound, torch.stack(bounds))
    there = [one for one in (*OURS, *BASELINES) if not one.needs_gpu]
    for row in rows_of(variants(case, inputs, there)):
        assert row["status"] == "measured", row


# The check


def test_sampled_rows_are_those_of_the_naive_reference() -> None:
    inputs = inputs_of(Case(2, 3, 8, 70), torch.float64)
    inputs = inputs._replace(layer=inputs.layer._replace(log_f=inputs.layer.log_f.double()))
    sample = Sample.of(inputs, seed=0)
    assert len(sample.rows) == 64 and sample.heads == (0, 2) and sample.batch == 1
    leaves = [x.clone().requires_grad_() for x in inputs.layer[1:5]]
    out, _ = naive_attention(*leaves, scale=inputs.layer.scale)
    grads = torch.autograd.grad(out, leaves, sample.only(inputs.dout))
    for head in sample.heads:
        found = attend_densely(inputs, sample, head, torch.float64)
        torch.testing.assert_close(found["out"], out[1, sample.rows, head], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["q"], grads[0][1, sample.rows, head], rtol=1e-10, atol=1e-12)
        for name, grad in zip(("k", "v", "log_f"), grads[1:], strict=True):
            torch.testing.assert_close(found[name], grad[1, :, head], rtol=1e-10, atol=1e-12)


def grouped_inputs(heads: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = (normal(2, tokens, heads[0 if x == 0 else 1], 8) for x in range(3))
    log_f = torch.nn.functional.logsigmoid(normal(2, tokens, heads[2]))
    return Inputs(AttentionInputs(0, q, k, v, log_f, 0.3), normal(*q.shape))


def test_sampled_rows_of_grouped_heads_are_those_of_the_naive_reference() -> None:
    inputs = grouped_inputs((4, 1, 2), 50, torch.float64)
    sample = Sample.of(inputs, seed=0)
    leaves = [x.clone().requires_grad_() for x in inputs.layer[1:5]]
    q, k, v, f = leaves
    out, _ = naive_attention(
        q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2), f.repeat_interleave(2, 2), scale=inputs.layer.scale
    )
    grads = torch.autograd.grad(out, leaves, sample.only(inputs.dout))
    for head in sample.heads:
        found = attend_densely(inputs, sample, head, torch.float64)
        torch.testing.assert_close(found["q"], grads[0][1, sample.rows, head], rtol=1e-9, atol=1e-10)
        for name, grad, index in (("k", grads[1], 0), ("v", grads[2], 0), ("log_f", grads[3], head // 2)):
            torch.testing.assert_close(found[name], grad[1, :, index], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [None, *RULES])
def test_our_attention_passes(rule: str | None, dtype: torch.dtype) -> None:
    row = measured(ours(rule), inputs_of(dtype=dtype))
    assert row["status"] == "measured", row
    assert set(row["errors"]) == {"out", "q", "k", "v", "log_f"}
    assert all(row["errors"][name] <= row["limits"][name] for name in row["errors"])
    assert (row["computed_tiles"] < 1.0) == (rule is not None) == ("search" in row)


def test_attention_without_gates_is_held_to_what_it_claims() -> None:
    flash = next(one for one in BASELINES if "FlashAttention" in one.name)
    row = measured(flash)
    assert row["status"] == "measured", row
    assert set(row["errors"]) == {"out", "q", "k", "v"}
    row = measured(replace(flash, gated=True))
    assert row["status"] == "wrong"
    assert row["reason"].startswith("output of head 0 is off by")


def spoiled(spoil: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Implementation:
    """Attention of inputs that are not quite those asked for."""
    return Implementation("spoiled", lambda layer: lambda *args: forgetting_attention(*spoil(*args), scale=layer.scale))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda q, k, v, f: (q, k, v, f.roll(1, dims=1)), "output"),
        (lambda q, k, v, f: (q, k, v, f.to(torch.bfloat16).float()), "output"),
        (lambda q, k, v, f: (q, k, torch.where(v > 3.0, math.nan, v), f), "output"),
        (lambda q, k, v, f: (q.detach() + 0.0 * q, k, v, f), "gradient of q"),
        (lambda q, k, v, f: (q, 2.0 * k.detach() - k, v, f), "gradient of k"),
        (lambda q, k, v, f: (q, k, v, f.detach() + 0.0 * f), "gradient of log_f"),
    ],
    ids=["gates shifted", "gates rounded", "NaN", "no gradient of q", "wrong gradient of k", "no gradient of gates"],
)
def test_control_what_is_wrong_is_not_timed(spoil, named: str) -> None:
    row = measured(spoiled(spoil))
    assert row["status"] == "wrong" and "forward" not in row
    assert row["reason"].startswith(named)


def test_control_the_spoiled_attention_is_right_unspoiled() -> None:
    assert measured(spoiled(lambda *args: args))["status"] == "measured"


def test_control_a_query_head_lost_from_its_group_is_found() -> None:
    inputs = grouped_inputs((4, 2, 4), 150, torch.float32)
    right = ours(None)

    def lossy(layer: AttentionInputs) -> implementations.Attend:
        attend = right.prepare(layer)
        # The second head of each group gives its keys and values no gradient.
        kept = torch.tensor([True, False, True, False])[:, None]
        return lambda *args: torch.where(
            kept, attend(*args), attend(args[0], args[1].detach(), args[2].detach(), args[3])
        )

    assert measured(right, inputs)["status"] == "measured"
    row = measured(replace(right, prepare=lossy), inputs)
    assert row["status"] == "wrong" and row["reason"].startswith("gradient of k")


def test_control_lost_pruning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Implementation, "computed_tiles", lambda self, layer: 1.0)
    row = measured(ours("tight"))
    assert row["status"] == "wrong"
    assert row["reason"].startswith("computes 100.0% of the tiles, where its rule leaves")


# Baselines


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    layer = inputs_of(Case(1, 4, 16, 384)).layer
    expected, _ = naive_attention(*layer[1:5], scale=layer.scale)
    q, k, v = (x.transpose(1, 2) for x in layer[1:4])
    monkeypatch.setattr(implementations, "_need_flash_attention_4", lambda: None)
    for one in (one for one in BASELINES if "FlexAttention" in one.name):
        with torch.no_grad():
            out = one.prepare(layer)(q, k, v, layer.log_f).transpose(1, 2)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
        assert (one.computed_tiles(layer) < 1.0) == (one.rule is not None)
        with pytest.raises(ValueError, match="multiples of 128 tokens, got 300"):
            one.prepare(inputs_of().layer)


def test_kernels_that_are_not_installed_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "find_spec", lambda name: None)
    for name in ("FlashAttention-4", "FLASH backend", "authors"):
        for one in chosen([name]):
            with pytest.raises(MissingError, match="is not installed"):
                one.prepare(inputs_of(Case(1, 4, 16, 384)).layer)


def test_the_authors_kernels_get_their_threshold_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attention(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return naive_attention(*(x.transpose(1, 2) for x in tensors), scale=options["sm_scale"])[0].transpose(1, 2)

    module = SimpleNamespace(forgetting_attention=attention)
    monkeypatch.setitem(sys.modules, "forgetting_transformer", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "forgetting_transformer.ops", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "forgetting_transformer.ops.forgetting_attention", module)
    monkeypatch.setattr(implementations, "find_spec", lambda name: name)
    dense, pruned = chosen(["authors"])
    for one in (dense, pruned):
        row = measured(replace(one, needs_gpu=False))
        assert row["status"] == "measured", row
    assert calls[0]["head_first"] and "adaptive_threshold" not in calls[0]
    # log eps - 2 U - log T, with U = sqrt(D).
    torch.testing.assert_close(
        calls[-1]["adaptive_threshold"], torch.full((CASE.batch, CASE.heads), -10.0 - 2 * 4.0 - math.log(CASE.tokens))
    )
    with pytest.raises(MissingError, match="as many key/value heads"):
        dense.prepare(inputs_of(replace(CASE, kv_heads=2)).layer._replace(k=torch.zeros(2, 300, 2, 16)))


def test_flex_block_mask_is_a_range_up_to_the_diagonal() -> None:
    first = torch.tensor([[[0, 0, 2, 1], [0, 1, 2, 3]]])
    mask = implementations.causal_block_mask(torch.zeros(1, 2, 4 * 128), first)
    blocks = torch.arange(4)
    assert torch.equal(mask.to_dense().bool(), (blocks >= first[..., None]) & (blocks <= blocks[:, None]))
    assert mask.kv_num_blocks.tolist() == [[[1] * 4] * 2]


def test_what_fails_is_recorded_and_the_others_go_on() -> None:
    def fails(layer: AttentionInputs):
        raise RuntimeError("out of memory\nand a long story")

    broken = Implementation("broken", fails)
    absent = Implementation("absent", fails, needs_gpu=True)
    matmul, *rows = rows_of(synthetic(CASE, [broken, absent, ours("tight")], "cpu", torch.float32))
    assert [one["status"] for one in rows] == ["failed", "missing", "measured", "measured"]
    assert rows[0]["reason"] == "RuntimeError: out of memory" and rows[0]["detail"].endswith("and a long story")
    assert rows[1]["reason"] == "needs a GPU"
    dense = CASE.flops(backward=False) / rows[2]["forward"]["ms"] / 1e9
    assert rows[2]["forward"]["dense_tflops"] == pytest.approx(dense)
    computed = dense * rows[2]["computed_tiles"]
    assert rows[2]["forward"]["computed_tflops"] == pytest.approx(computed)
    assert rows[2]["forward"]["of_matmul"] == pytest.approx(computed / matmul["forward"]["dense_tflops"])
    assert rows[3]["name"].endswith(", open gates") and rows[3]["computed_tiles"] == 1.0


def test_implementations_are_chosen_by_a_part_of_their_names() -> None:
    assert [one.name for one in chosen(["CUDNN", "tight"])] == ["foxlm, ACP tight", "cuDNN, no gate"]
    assert len(chosen([])) == len(OURS) + len(BASELINES)
    with pytest.raises(ValueError, match=r"--only must be part of one of \['foxlm', .*, got 'xformers'"):
        chosen(["xformers"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_all_that_is_installed_is_measured() -> None:
    from foxlm.evaluation.benchmark.runner import Report, run

    report = Report({"rows": []}, None)
    run(synthetic(Case(1, 4, 64, 1024), chosen([]), "cuda", torch.bfloat16), report, 2, "cuda")
    for one in report.results["rows"]:
        assert one["status"] in ("measured", "missing"), one
        assert one["status"] == "missing" or one["name"] == "matmul" or one["peak_bytes"] > 0
