"""`foxlm bench prefill` and `foxlm bench decode`: what they measure, and what they refuse to time."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from benchmark_rows import rows_of
from foxlm import FoxForCausalLM
from foxlm.evaluation.benchmark import generation
from foxlm.evaluation.benchmark.attentions import with_names
from foxlm.evaluation.benchmark.generation import DECODERS, PREFILLERS, Generator, Session, build_models, greedy_step
from foxlm.evaluation.benchmark.models import CPU_SIZES, EPS, Workload, computed_tiles, largest_error
from foxlm.evaluation.gates import RULES, kept_from
from foxlm.evaluation.recording import record_attention
from foxlm.kernels.pruning.rules import share_skipped
from foxlm.modeling.cache.static import StaticForgettingLayer
from models import tiny_config

WORKLOAD = Workload("cpu", sizes=tuple(CPU_SIZES.items()))


def decoded(names: Sequence[str], batch: int = 2) -> list[dict[str, Any]]:
    decoders = with_names(DECODERS, names)
    models = build_models(WORKLOAD, decoders)
    return rows_of(generation.decode_variants(batch, models, decoders, WORKLOAD, tokens=60, new=1, rounds=1))


def prefilled(prefillers: Sequence[Generator], tokens: int = 200) -> list[dict[str, Any]]:
    models = build_models(WORKLOAD, prefillers)
    return rows_of(generation.prefill_variants(2, tokens, models, prefillers, WORKLOAD, chunk=64))


@pytest.mark.slow
def test_prompts_are_measured() -> None:
    rows = prefilled(PREFILLERS)
    assert [one["name"] for one in rows] == [one.name for one in PREFILLERS]
    for row, one in zip(rows, PREFILLERS, strict=True):
        assert row["status"] == "measured" and row["error"] <= row["limit"] < 0.1, row
        assert row["tokens_per_second"] == pytest.approx(400e3 / row["first_token"]["ms"])
        if one.family == "foxlm":
            assert (row["computed_tiles"] < 1.0) == (one.rule is not None)
        # Keys and values of two layers, 64 values of two bytes each.
        assert row["stored_bytes"] == 400 * 2 * 2 * 64 * 2 if one.cache == "dynamic" else row["stored_bytes"] > 0


def test_chunks_are_left_out_where_the_prompt_is_one() -> None:
    chosen = [one for one in PREFILLERS if one.rule is None and one.family == "foxlm"]
    assert [one["name"] for one in prefilled(chosen, tokens=60)] == ["foxlm"]


def test_control_a_prompt_whose_chunks_forget_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Session.fill

    def forgetting(self: Session, ids: Tensor, chunk: int, forward: Any) -> Tensor:
        return fill(self, ids[:, chunk:] if chunk < ids.shape[1] else ids, chunk, forward)

    monkeypatch.setattr(Session, "fill", forgetting)
    whole, chunked = prefilled([PREFILLERS[0], next(one for one in PREFILLERS if one.chunked)])
    assert (whole["status"], chunked["status"]) == ("measured", "wrong")
    assert chunked["reason"].startswith("logits are off by") and "first_token" not in chunked


def test_a_variant_that_fails_or_gives_nan_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Session.fill

    def broken(self: Session, ids: Tensor, chunk: int, forward: Any) -> Tensor:
        logits = fill(self, ids, chunk, forward)
        if forward.config.model_type == "llama":
            raise torch.OutOfMemoryError("no room\nat all")
        return logits * torch.nan if chunk < ids.shape[1] else logits

    monkeypatch.setattr(Session, "fill", broken)
    rows = {one["name"]: one for one in prefilled([one for one in PREFILLERS if one.rule is None], tokens=100)}
    assert rows["foxlm"]["status"] == "measured"
    assert rows["foxlm, chunked prefill"]["reason"].startswith("logits are off by nan")
    assert rows["Llama"]["reason"] == "OutOfMemoryError: no room"


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
        first = torch.stack([kept_from(one, np.log(EPS), rule, 128, 64) for one in layers]).flatten(0, 1)
        assert found[rule] == pytest.approx(1.0 - share_skipped(first, 300, 128, 64).mean().item(), abs=1e-9)
    assert found["tight"] < found[None] == 1.0
    assert computed_tiles(FoxForCausalLM(tiny_config("gateless")), ids, None) == 1.0


def test_decoding_is_measured() -> None:
    rows = decoded([])
    assert [one["name"] for one in rows] == [one.name for one in DECODERS]
    # Keys and values of two layers, 64 values of two bytes each, of two sequences.
    of_a_token = 2 * 2 * 2 * 64 * 2
    for row in rows:
        assert row["status"] == "measured" and row["error"] <= row["limit"] < 0.1, row
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["step"]["ms"])
        # 60 tokens and 4 steps to warm up; a static cache is a multiple of 64.
        expected = {"dynamic": 64 * of_a_token, "static": 128 * of_a_token, "paged": row["stored_bytes"]}
        assert row["stored_bytes"] == expected[row["cache"]] > 0
        assert row["compiled"] is False


@pytest.mark.parametrize("forgotten", ["gates", "unshifted"])
def test_control_a_cache_that_forgets_is_not_timed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Session.fill

    def forgetting(self: Session, ids: Tensor) -> Tensor:
        logits = fill(self, ids)
        for layer in self.cache.layers:
            if isinstance(layer, StaticForgettingLayer):
                assert layer.gates is not None
                for buffer in layer.gates[:2] if forgotten == "gates" else layer.unshifted.values():
                    buffer.zero_()
        return logits

    monkeypatch.setattr(Session, "fill", forgetting)
    rows = {one["name"]: one for one in decoded(["foxlm, static", "Llama, static"])}
    assert rows["Llama, static cache"]["status"] == "measured"
    assert rows["foxlm, static cache"]["status"] == "wrong" and "step" not in rows["foxlm, static cache"]
    assert rows["foxlm, static cache"]["reason"].startswith("logits are off by")


def test_a_decoder_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Session.step

    def fails(self: Session) -> Tensor:
        if isinstance(self.cache, StaticCache):
            raise torch.OutOfMemoryError("no room\nat all")
        return step(self)

    monkeypatch.setattr(Session, "step", fails)
    rows = {one["name"]: one["status"] for one in decoded(["Llama"])}
    assert rows == {"Llama": "measured", "Llama, static cache": "failed"}


def test_chunked_context_is_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Generator("foxlm", "static", "tight")
    model = build_models(WORKLOAD, [one])["foxlm"].double()
    ids = torch.randint(256, (2, 70))
    logits = []
    for longest in (1000, 32):
        monkeypatch.setattr(generation, "_LONGEST_CHUNK", longest)
        session = Session(one, model, greedy_step, 2, 128)
        logits.append(session.fill(ids))
        assert session.cache.get_seq_length() == 70
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)


def test_error_is_that_of_the_worst_token() -> None:
    exact = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    found = torch.tensor([[[3.0, 4.5], [1.0, 10.0]]])
    assert largest_error(found, exact) == pytest.approx(0.1)
    assert math.isnan(largest_error(torch.full_like(exact, math.nan), exact))


def test_models_have_the_same_sizes() -> None:
    models = build_models(WORKLOAD, DECODERS)
    shapes = [
        {name: tuple(weight.shape) for name, weight in one.named_parameters() if "_proj" in name or "embed" in name}
        for one in models.values()
    ]
    assert shapes[1] == {name: shape for name, shape in shapes[0].items() if name in shapes[1]}
    assert all(one.dtype == torch.bfloat16 and not one.training for one in models.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_decoding_is_compiled_and_replayed() -> None:
    from foxlm.evaluation.benchmark.runner import Report, run

    workload = Workload("cuda", sizes=WORKLOAD.sizes)
    report = Report({"rows": []}, None)
    models = build_models(workload, DECODERS)
    run(generation.decode_variants(2, models, DECODERS, workload, 1000, 2, 1), report, 1, "cuda")
    for one in report.results["rows"]:
        assert one["status"] == "measured", one
        assert one["peak_bytes"] > one["stored_bytes"]
