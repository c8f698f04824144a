"""`foxlm bench generate`: what it measures, and what it refuses to time."""

import io
import json
import math
import pickle
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark_rows import rows_of
from foxlm import FoxForCausalLM
from foxlm.evaluation.benchmark import cold_start, generation
from foxlm.evaluation.benchmark.generation import CALLS, Call, Models, build_models, call_variants
from foxlm.evaluation.benchmark.models import CPU_SIZES, Workload, computed_tiles, largest_error
from foxlm.evaluation.benchmark.public_calls import MEASURED, Sizes, chosen, groups, usable
from foxlm.evaluation.benchmark.results import add_ratios
from foxlm.evaluation.gates import RULES, kept_from
from foxlm.evaluation.recording import record_attention
from foxlm.kernels.pruning.prune import share_skipped
from foxlm.modeling.cache.static import StaticForgettingLayer
from foxlm.modeling.configuration_fox import DEFAULT_LOG_EPS
from foxlm.modeling.versions import CACHE
from models import tiny_config

WORKLOAD = Workload("cpu", sizes=tuple(CPU_SIZES.items()))
# Of keys and values of a token: two layers, 64 values of two bytes each.
TOKEN_BYTES = 2 * 2 * 64 * 2


def calls_of(names: Sequence[str], models: Models) -> list[Call]:
    return [one for one in usable(models["foxlm"].config, chosen(names)) if isinstance(one, Call)]


def measured(names: Sequence[str], tokens: int = 60, new: int = 1) -> dict[str, dict[str, Any]]:
    models = build_models(WORKLOAD, CALLS)
    rows = rows_of(call_variants(calls_of(names, models), models, WORKLOAD, 2, tokens, new, chunk=64))
    return {one["name"]: one for one in rows}


def test_tokens_after_a_context_are_measured() -> None:
    rows = measured(["decode: "])
    names = [one.name for one in CALLS if one.part == "decode" and one.graphs]
    assert [name for name in rows if "no CUDA graphs" not in name] == names
    for row in rows.values():
        assert row["status"] == "measured" and row["error"] <= row["limit"] < 0.1, row
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["step"]["ms"])
        assert row["call_ms_a_token"] == row["call"]["ms"] and row["first_call_seconds"] > 0.0
        # The last of two new tokens is not in a cache.
        assert row["stored_bytes"] > 0 if row["cache"] == "paged" else row["stored_bytes"] >= 2 * 61 * TOKEN_BYTES
    assert rows["decode: foxlm, paged cache"]["against"] == {
        "llama": "decode: Llama, static cache",
        "own": "decode: foxlm, static cache",
    }


def test_prompts_are_measured() -> None:
    rows = measured(["prefill: "], tokens=200)
    assert list(rows) == [one.name for one in CALLS if one.part == "prefill"]
    for name, row in rows.items():
        assert row["status"] == "measured" and row["error"] <= row["limit"] < 0.1, row
        assert row["tokens_per_second"] == pytest.approx(400e3 / row["first_token"]["ms"])
        assert row["stored_bytes"] > 0 if row["cache"] == "paged" else row["stored_bytes"] >= 400 * TOKEN_BYTES
        assert ("over_own" in row) == (name not in ("prefill: foxlm", "prefill: Llama"))
        assert ("over_llama" in row) == (row["family"] == "foxlm")
    assert rows["prefill: foxlm"]["computed_tiles"] < rows["prefill: foxlm, not pruned"]["computed_tiles"] == 1.0
    assert list(measured(["prefill: foxlm, chunked", "prefill: Llama"])) == ["prefill: Llama"]


def test_a_token_is_the_difference_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(call: Any, rounds: int, device: str, warm_up: int) -> list[float]:
        (new,) = call.args
        return [100.0 + 7.0 * new] * rounds

    monkeypatch.setattr(generation, "wall_times", linear)
    row = measured(["decode: Llama"], new=3)["decode: Llama"]
    assert row["step"]["ms"] == pytest.approx(7.0) and row["first_token"]["ms"] == 107.0
    assert row["call_ms_a_token"] == pytest.approx(121.0 / 3)


def test_each_call_has_its_configuration_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    models = build_models(WORKLOAD, CALLS)
    config = models["foxlm"].config
    config.decoding_graphs = True
    before = config.to_dict()
    seen = []
    generate = FoxForCausalLM.generate

    def noting(self: Any, ids: Tensor, **options: Any) -> Any:
        seen.append((options.get("cache_implementation"), config.free_dead_cache, config.decoding_graphs))
        return generate(self, ids, **options)

    monkeypatch.setattr(FoxForCausalLM, "generate", noting)
    calls = calls_of(["decode: foxlm"], models)
    assert [one.graphs for one in calls] == [True, False, True, False, True]
    rows_of(call_variants(calls, models, WORKLOAD, 1, 40, 1, chunk=64))
    assert set(seen) == {
        (None, False, True),
        (None, False, False),
        ("static", False, True),
        ("static", False, False),
        (None, True, True),
    }
    assert config.to_dict() == before


@pytest.mark.parametrize("forgotten", ["gates", "unshifted"])
def test_control_a_cache_that_forgets_is_not_timed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FoxForCausalLM.forward

    def forgetting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        for layer in getattr(kwargs.get(CACHE), "layers", ()):
            if isinstance(layer, StaticForgettingLayer):
                assert layer.gates is not None
                for buffer in layer.gates[:2] if forgotten == "gates" else layer.unshifted.values():
                    buffer.zero_()
        return out

    monkeypatch.setattr(FoxForCausalLM, "forward", forgetting)
    rows = measured(["decode: foxlm, static cache", "decode: Llama, static"])
    assert rows["decode: Llama, static cache"]["status"] == "measured"
    wrong = rows["decode: foxlm, static cache"]
    assert wrong["status"] == "wrong" and "step" not in wrong and "over_llama" not in wrong
    assert wrong["reason"].startswith("logits are off by")


def test_control_a_prompt_whose_chunks_forget_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = FoxForCausalLM.generate

    def forgetting(self: Any, ids: Tensor, **options: Any) -> Any:
        other = ids.clone()
        other[:, : options["prefill_chunk_size"]] = 1
        out = generate(self, other, **options)
        out["sequences"] = torch.cat([ids, out.sequences[:, ids.shape[1] :]], dim=1)
        return out

    monkeypatch.setattr(FoxForCausalLM, "generate", forgetting)
    rows = measured(["prefill: foxlm"], tokens=100)
    status = {name: row["status"] for name, row in rows.items()}
    assert [name for name, found in status.items() if found == "wrong"] == [x for x in status if "chunked" in x]
    assert "first_token" not in rows["prefill: foxlm, chunked prefill"]


def test_a_call_that_fails_or_gives_too_few_tokens_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = FoxForCausalLM.generate

    def broken(self: Any, ids: Tensor, **options: Any) -> Any:
        if options.get("cache_implementation") == "static":
            raise torch.OutOfMemoryError("no room\nat all")
        return generate(self, ids, **options | {"max_new_tokens": 1})

    monkeypatch.setattr(FoxForCausalLM, "generate", broken)
    rows = measured(["decode: foxlm", "decode: Llama"])
    assert rows["decode: foxlm, static cache"]["reason"] == "OutOfMemoryError: no room"
    assert rows["decode: foxlm"]["reason"] == "RuntimeError: generate gave 1 tokens, asked for 2"
    assert {row["status"] for name, row in rows.items() if "Llama" in name} == {"measured"}


def test_rows_are_chosen_by_name_and_cost() -> None:
    names = [one.name for one in MEASURED]
    assert len(set(names)) == len(names) and chosen([]) == list(MEASURED)
    assert {one.name.partition(":")[0] for one in chosen([], quick=True)} == {"decode", "prefill"}
    left_out = {one.name for one in MEASURED} - {one.name for one in chosen([], compiled=False)}
    assert left_out == {
        "decode: foxlm, static cache, no CUDA graphs",
        "decode: Llama, static cache",
        "train: foxlm, compiled",
    }
    assert [one.name for one in chosen(["Llama, static"], quick=True)] == ["decode: Llama, static cache"]
    assert {one.name.partition(":")[0] for one in chosen(["foxlm"], part="prefill")} == {"prefill"}
    with pytest.raises(ValueError, match="--only must be part of one of"):
        chosen(["vLLM"])
    with pytest.raises(ValueError, match="--no-compile leaves nothing of --only"):
        chosen(["Llama, static"], compiled=False)
    gateless = tiny_config("gateless")
    assert not any("paged" in one.name or "pruned" in one.name for one in usable(gateless, MEASURED))
    with pytest.raises(ValueError, match="the FoX has no forget gates"):
        usable(gateless, chosen(["paged"]))


def test_sizes_are_the_benchmarks_or_those_given() -> None:
    usual = list(Sizes(64, 4096).contexts("cuda"))
    assert usual[:2] == [("decode", 1, 14336), ("decode", 8, 14336)]
    assert usual[2:] == [("prefill", 1, 4096), ("prefill", 1, 16384), ("prefill", 8, 16384)]
    given = list(Sizes(64, 4096, tokens=(100,), batches=(3,)).contexts("cuda"))
    assert given == [("decode", 3, 100), ("prefill", 3, 100)]
    assert Sizes(64, 4096, tokens=(100, 200)).of_training("cuda") == 200


def test_parts_follow_one_another_and_models_are_let_go() -> None:
    models = build_models(WORKLOAD, CALLS)
    rows = []
    rows_asked = chosen(["decode: foxlm, static cache", "train: foxlm"], compiled=False)
    for variants, passes in groups(rows_asked, models, WORKLOAD, Sizes(1, 64, tokens=(64,))):
        rows += rows_of(variants)
        assert passes == 2
    assert [(one["name"], one["batch"], one["status"]) for one in rows] == [
        ("decode: foxlm, static cache", 1, "measured"),
        ("decode: foxlm, static cache", 8, "measured"),
        ("train: foxlm", 1, "measured"),
    ]
    assert not models and rows[-1]["step"]["ms"] > 0.0


def test_ratios_are_of_rows_of_the_same_sizes() -> None:
    def row(name: str, ms: float, batch: int = 1, status: str = "measured", **against: str) -> dict[str, Any]:
        return {"name": name, "batch": batch, "status": status, "against": against, "step": {"ms": ms}}

    rows = [row("a", 2.0, llama="b", own="c"), row("b", 8.0), row("b", 100.0, batch=8), row("c", 4.0, status="wrong")]
    rows += [row("d", -1.0, llama="b"), {"name": "e", "status": "measured"}]
    add_ratios(rows)
    assert rows[0]["over_llama"] == 4.0
    assert [sum(name.startswith("over_") for name in one) for one in rows] == [1, 0, 0, 0, 0, 0]


# New processes


@pytest.mark.parametrize("what", ["foxlm", "Llama", "attention"])
def test_a_new_process_says_how_long_it_took(
    what: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = pickle.dumps((cold_start.Start(what), WORKLOAD, 40))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
    cold_start.main(1.5)
    found = json.loads(capsys.readouterr().out)
    assert found["import"] == 1.5 and found["fault"] is None
    assert min(found[part] for part in ("load", "first", "again")) > 0.0
    assert found["row"]


@pytest.mark.slow
def test_new_processes_are_measured_with_an_empty_kernel_cache_and_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [one for one in cold_start.STARTS if one.what == "foxlm"]
    empty, full = rows_of(cold_start.start_variants(starts, WORKLOAD))
    assert (empty["name"], full["name"]) == ("start: foxlm, empty kernel cache", "start: foxlm")
    for row in (empty, full):
        assert row["status"] == "measured" and row["first"]["ms"] > 0.0 and row["import_seconds"] > 0.0
    assert "over_own" in empty
    (failed,) = rows_of(cold_start.start_variants(starts[1:], Workload("cpu", preset="none")))
    assert failed["reason"].startswith("RuntimeError: the process ended with 1: ValueError: name must be one of")


# The model and its check


@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates"])
def test_computed_tiles_are_those_of_the_definition(variant: str) -> None:
    torch.manual_seed(0)
    model = FoxForCausalLM(tiny_config(variant, decay_time_max=5.0)).eval()
    ids = torch.randint(2, 97, (2, 300))
    with torch.no_grad(), record_attention(model) as layers:
        model.model(ids, use_cache=False)
    found = {rule: computed_tiles(model, ids, rule) for rule in (None, *RULES)}
    # With QK-norm the rule `paper` has another bound there.
    for rule in RULES[1:] if variant != "llama" else RULES:
        first = torch.stack([kept_from(one, DEFAULT_LOG_EPS, rule, 128, 64) for one in layers]).flatten(0, 1)
        assert found[rule] == pytest.approx(1.0 - share_skipped(first, 300, 128, 64).mean().item(), abs=1e-9)
    assert found["tight"] < found[None] == 1.0
    assert computed_tiles(FoxForCausalLM(tiny_config("gateless")), ids, None) == 1.0


def test_error_is_that_of_the_worst_token() -> None:
    exact = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    found = torch.tensor([[[3.0, 4.5], [1.0, 10.0]]])
    assert largest_error(found, exact) == pytest.approx(0.1)
    assert math.isnan(largest_error(torch.full_like(exact, math.nan), exact))


def test_models_have_the_same_sizes() -> None:
    models = build_models(WORKLOAD, CALLS)
    shapes = [
        {name: tuple(weight.shape) for name, weight in one.named_parameters() if "_proj" in name or "embed" in name}
        for one in models.values()
    ]
    assert shapes[1] == {name: shape for name, shape in shapes[0].items() if name in shapes[1]}
    assert all(one.dtype == torch.bfloat16 and not one.training for one in models.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_all_calls_are_measured_on_a_gpu() -> None:
    from foxlm.evaluation.benchmark.runner import Report, run

    workload = Workload("cuda", sizes=WORKLOAD.sizes)
    report = Report({"rows": []}, None)
    models = build_models(workload, CALLS)
    rows = usable(models["foxlm"].config, chosen([], quick=True, compiled=False))
    for variants, passes in groups(rows, models, workload, Sizes(2, 256, tokens=(1000,))):
        run(variants, report, 1, "cuda", passes=passes)
    for one in report.results["rows"]:
        assert one["status"] == "measured", one
        assert one["peak_bytes"] > one["stored_bytes"] > 0
