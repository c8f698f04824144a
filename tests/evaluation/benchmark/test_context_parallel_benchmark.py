"""`foxlm bench context`: what it holds to what, what it times, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import speed_ranks
from foxlm.cli.bench import app
from foxlm.evaluation.speed import report, several_tables, tables
from foxlm.evaluation.speed.context import ContextRecipe, fastest, relative_errors, run_context, slowest
from foxlm.evaluation.speed.implementations import EPS
from foxlm.evaluation.speed.inputs import Case

CASES = (Case(1, 4, 16, 256), Case(1, 5, 8, 200))


def test_together_is_the_slowest_rank_of_each_call_and_alone_the_fastest() -> None:
    # Two ranks, two passes of two rounds.
    of_ranks = [[[1.0, 9.0], [1.0, 1.0]], [[2.0, 3.0], [4.0, 4.0]]]
    timing = slowest(of_ranks)
    assert timing.ms == 4.0 and timing.spread == pytest.approx((5.5 - 4.0) / 4.0)
    assert fastest(of_ranks).ms == 1.0 and fastest(of_ranks[1:]).ms == 3.5


def test_a_head_with_a_small_output_is_not_hidden_by_the_others() -> None:
    # Of two tensors, the second head of the second is wrong altogether, but ten thousand times as small.
    squares = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1e8, 1.0]]], dtype=torch.float64)
    whole, of_heads = relative_errors(squares)
    assert whole.tolist() == [0.0, pytest.approx(1e-4)] and of_heads.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    squares[0, 0, 0] = math.nan
    assert relative_errors(squares)[1][0].isnan().tolist() == [True, False]


def test_less_is_allowed_in_float32_and_without_pruning() -> None:
    exact = ContextRecipe(CASES, 2, "cpu", torch.float32, rule=None)
    assert exact.limit == pytest.approx(1e-5, rel=0.02)
    assert ContextRecipe(CASES, 2, "cpu", torch.float32).limit == pytest.approx(exact.limit + 4 * EPS)
    assert exact.limit < ContextRecipe(CASES, 2, "cpu").limit < 0.01


def test_attention_on_two_ranks_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "context.json"
    arguments = ["context", "--gpus", "2", "--device", "cpu", "--rounds", "1", "--dtype", "float32", "--out", str(out)]
    arguments += [option for case in CASES for option in ("--case", str(case))]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert results == json.loads(result.stdout)
    assert (results["kind"], results["settings"]["gpus"], results["settings"]["rule"]) == ("context", 2, "tight")
    assert results["run"]["commit"] and "error" not in results
    assert [one["case"] for one in results["cases"]] == [str(case) for case in CASES]
    for case, one in zip(CASES, results["cases"], strict=True):
        assert one["status"] == "measured" and one["same_bits"] is True
        assert set(one["errors"]) == set(one["errors_of_heads"]) == {"out", "q", "k", "v", "log_f"}
        assert all(one["errors"][name] <= worst < 1e-5 for name, worst in one["errors_of_heads"].items())
        traffic = one["traffic"]
        # Each rank gets the half of keys and values that the other has.
        assert traffic["ring"] == 2 * 4 * case.heads * case.head_dim * case.tokens
        assert 0 < traffic["moved"] < traffic["ring"] and traffic["share"] == traffic["moved"] / traffic["ring"]
        for times in one["times"].values():
            for how in ("idle", "in_a_row"):
                assert times["speedup"][how] == pytest.approx(times["one"][how]["ms"] / times["together"][how]["ms"])
        for who in ("one", "together"):
            forward, both = (one["times"][part][who]["in_a_row"]["ms"] for part in ("forward", "forward_backward"))
            assert 0.0 < forward < both
    drawn = tables.render(results)
    assert "Figures of no use" in drawn and "by context parallelism on 2 GPUs of one host, balanced split" in drawn
    assert drawn.count("| 1 x 4 x 16 x 256 |") == 3 and "| fwd + bwd |" in drawn
    assert report.merged([results, report.read(out)])[0]["cases"] == 2 * results["cases"]


def test_control_what_is_wrong_is_not_timed_and_what_fails_leaves_the_rest() -> None:
    lost, right, nothing = Case(1, 4, 16, speed_ranks.LOST_AT), CASES[1], Case(1, 2, 0, 64)
    killed = Case(1, 1, 8, speed_ranks.KILLED_AT)
    cases = [lost, right, nothing, killed, right]
    results = run_context(ContextRecipe(cases, 2, "cpu", rounds=1, attend=speed_ranks.failing_by_length))
    assert results["error"] == "rank 1 of 2 was ended by SIGKILL"
    found = results["cases"]
    assert [one["status"] for one in found] == ["wrong", "measured", "failed", "unfinished"]
    assert "times" not in found[0] and "traffic" not in found[0]
    assert found[0]["reason"].startswith("output is off by ")
    assert found[0]["errors_of_heads"]["out"] > 10 * found[0]["limit"]
    assert "ZeroDivisionError" in found[2]["reason"]

    settings = {"gpus": 2, "rule": "none", "split": "contiguous", "calls_in_a_row": 6}
    drawn = several_tables.render_context(results | {"settings": settings})
    assert "* 1 x 4 x 16 x 256, context parallelism: failed its check and was not timed: output is off by" in drawn
    assert "* 1 x 1 x 8 x 64, context parallelism: not measured: the run ended before" in drawn
    assert "| 1 x 5 x 8 x 200 | fwd + bwd |" in drawn and "pruned" not in drawn


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
        (["--gpus", "4", "--case", "1x1x8x3"], "--case must have a token for each of 4 GPUs, got '1x1x8x3' with 3"),
        (["--split", "zigzag"], "--split must be one of balanced, contiguous, got 'zigzag'"),
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
