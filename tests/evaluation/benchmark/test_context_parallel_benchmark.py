"""`foxlm bench context`: what it compares with what, what it times, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import speed_ranks
from foxlm.cli.bench import app
from foxlm.evaluation.benchmark.attention.context_parallel import (
    ContextRecipe,
    fastest,
    measure_on_rank,
    relative_errors,
)
from foxlm.evaluation.benchmark.attention.inputs import Case
from foxlm.evaluation.benchmark.ranks import RankError, run_ranks, slowest
from foxlm.evaluation.benchmark.results import read
from foxlm.modeling.configuration_fox import DEFAULT_EPS

CASES = (Case(1, 4, 16, 256), Case(1, 5, 8, 200))
RECIPE = ContextRecipe(CASES, 2, "cpu", torch.bfloat16, "tight", "zigzag", rounds=1, seed=0)


def test_together_is_the_slowest_rank_of_each_call_and_alone_the_fastest() -> None:
    assert slowest([[1.0, 9.0], [2.0, 3.0]]) == [2.0, 9.0]
    assert fastest([[1.0, 9.0], [2.0, 3.0]]) == [2.0, 3.0]


def test_a_head_with_a_small_output_is_not_hidden_by_the_others() -> None:
    # Of two tensors, the second head of the second is wrong altogether, but ten thousand times as small.
    squares = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1e8, 1.0]]], dtype=torch.float64)
    whole, of_heads = relative_errors(squares)
    assert whole.tolist() == [0.0, pytest.approx(1e-4)] and of_heads.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    squares[0, 0, 0] = math.nan
    assert relative_errors(squares)[1][0].isnan().tolist() == [True, False]


def test_less_is_allowed_in_float32_and_without_pruning() -> None:
    exact = replace(RECIPE, dtype=torch.float32, rule=None)
    assert exact.limit == pytest.approx(1e-5, rel=0.02)
    assert replace(RECIPE, dtype=torch.float32).limit == pytest.approx(exact.limit + 4 * DEFAULT_EPS)
    assert exact.limit < RECIPE.limit < 0.01


@pytest.mark.slow
def test_attention_on_two_ranks_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "context.json"
    arguments = ["context", "--gpus", "2", "--device", "cpu", "--rounds", "1", "--dtype", "float32", "--out", str(out)]
    arguments += [option for case in CASES for option in ("--case", str(case))]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert results == json.loads(result.stdout)
    assert (results["kind"], results["settings"]["gpus"], results["settings"]["rule"]) == ("context", 2, "tight")
    assert [one["case"] for one in results["rows"]] == [str(case) for case in CASES for _ in range(2)]
    for number, one in enumerate(results["rows"]):
        case = CASES[number // 2]
        assert one["status"] == "measured" and one["deterministic"] is True
        assert set(one["errors"]) == set(one["errors_of_heads"]) == {"out", "q", "k", "v", "log_f"}
        assert all(one["errors"][name] <= worst < 1e-5 for name, worst in one["errors_of_heads"].items())
        traffic = one["traffic"]
        # Each rank gets the half of keys and values that the other has.
        assert traffic["ring"] == 2 * 4 * case.heads * case.head_dim * case.tokens
        assert 0 < traffic["moved"] < traffic["ring"] and traffic["share"] == traffic["moved"] / traffic["ring"]
        assert one["speedup"] == pytest.approx(one["one"]["ms"] / one["together"]["ms"])
        assert one["speedup_in_a_row"] == pytest.approx(one["one_in_a_row"]["ms"] / one["together_in_a_row"]["ms"])


@pytest.mark.slow
def test_control_what_is_wrong_is_not_timed_and_what_fails_leaves_the_rest(tmp_path: Path) -> None:
    lost, right, nothing = Case(1, 4, 16, speed_ranks.LOST_AT), CASES[1], Case(1, 2, 0, 64)
    killed = Case(1, 1, 8, speed_ranks.KILLED_AT)
    recipe = replace(RECIPE, cases=(lost, right, nothing, killed, right), attend=speed_ranks.failing_by_length)
    results = {"schema": 2, "kind": "context", "run": {}, "settings": {}, "rows": []}
    with pytest.raises(RankError, match=r"rank 1 of 2 was ended by SIGKILL"):
        run_ranks(measure_on_rank, 2, "cpu", recipe, results, tmp_path / "results.json")
    rows = read(tmp_path / "results.json")["rows"]
    assert [one["status"] for one in rows] == [*["wrong"] * 2, *["measured"] * 2, *["missing"] * 2, "unfinished"]
    assert "together" not in rows[0] and rows[0]["reason"].startswith("output of the worst head is off by ")
    assert rows[0]["errors_of_heads"]["out"] > 10 * rows[0]["limit"]
    assert "ZeroDivisionError" in rows[4]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "1"], "--gpus must be 2 or more, which share a sequence, got 1"),
        (["--gpus", "-2"], "--gpus must be 2 or more, which share a sequence, got -2"),
        (["--gpus", "9"], "--gpus must be at most 8 processes with --device cpu, got 9"),
        (
            ["--case", "1x24x64"],
            "--case must be four positive integers BxHxDxT such as 2x24x64x16384, each below 10**9, got '1x24x64'",
        ),
        (["--gpus", "4", "--case", "1x1x8x3"], "--case must have a token for each of 4 GPUs, got 1x1x8x3 with 3"),
        (["--split", "striped"], "--split must be one of zigzag, contiguous, got 'striped'"),
        (["--rule", "loose"], "--rule must be one of paper, tight, none, got 'loose'"),
        (["--dtype", "float64"], "--dtype must be one of bfloat16, float16, float32, got 'float64'"),
        (["--rounds", "0"], "--rounds must be a positive integer, got 0"),
        (["--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        (["--out", "."], "--out must be a file, got the folder ."),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["context", "--device", "cpu", *arguments])
    assert result.exit_code == 1
    assert result.stderr == f"error: {message}\n"
