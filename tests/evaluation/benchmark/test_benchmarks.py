"""The speed benchmarks, in small: what they count, what they refuse to time, and what becomes of their results."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from typer.testing import CliRunner

from foxlm import FoxConfig, forgetting_attention
from foxlm.cli.bench import app
from foxlm.evaluation.gates import kept_from
from foxlm.evaluation.recording import record_attention
from foxlm.evaluation.speed import decode, flex, largest_batch, logits, observed, report, train
from foxlm.evaluation.speed.attention import Settings, chosen, run_case
from foxlm.evaluation.speed.bars import attention_bars, decode_bars, largest_batch_bars, train_bars
from foxlm.evaluation.speed.competitors import COMPETITORS, CUDNN
from foxlm.evaluation.speed.correctness import Sample, attend_densely
from foxlm.evaluation.speed.implementations import EPS, RULES, Implementation, first_by_definition, share_kept
from foxlm.evaluation.speed.inputs import Case, Inputs, make_inputs, spread_decay_times
from foxlm.evaluation.speed.models import CPU_SIZES, build_fox
from foxlm.evaluation.speed.own import OWN, own, own_name
from foxlm.evaluation.speed.runner import Bench, Record
from foxlm.evaluation.speed.sessions import DECODERS, Decoder, Session, greedy_step
from foxlm.evaluation.speed.timing import interleaved
from foxlm.evaluation.speed.workload import Workload
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.cache.dynamic import StaticForgettingLayer
from naive import naive_attention

CASE = Case(2, 4, 16, 300)
PARTS = ("forward", "forward_backward")
SIZES = tuple(CPU_SIZES.items())


def inputs_of(case: Case = CASE, dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(case, "cpu", dtype, seed=0)


def admit(implementation: Implementation, dtype: torch.dtype = torch.float32) -> Record:
    return Bench(inputs_of(dtype=dtype), "cpu", seed=0).admit(implementation)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


# Inputs


def test_a_fifth_of_the_heads_forgets_slowly() -> None:
    for heads, slow in ((4, 1), (12, 2), (24, 4)):
        times = spread_decay_times(heads)
        assert times.equal(times.sort().values)
        assert ((times > 1) & (times < 100)).sum() == heads - slow
        assert ((times > 1e3) & (times < 1e6)).sum() == slow


def test_inputs_are_normalized_forget_at_their_pace_and_repeat() -> None:
    inputs, again = inputs_of(), inputs_of()
    assert all(torch.equal(x, y) for x, y in zip(inputs[:5], again[:5], strict=True))
    largest = inputs.scale * inputs.q.norm(dim=-1).max() * inputs.k.norm(dim=-1).max()
    assert largest.item() == pytest.approx(inputs.logit_bound, rel=1e-4)
    # The mean of exp(0.5 n) is exp(1 / 8).
    pace = -inputs.log_f.double().mean((0, 1)) * spread_decay_times(CASE.heads)
    torch.testing.assert_close(pace, torch.full_like(pace, math.exp(0.125)), rtol=0.1, atol=0.0)
    assert inputs.open().log_f.abs().max() == 0.0


def test_pruning_keeps_what_was_published_for_such_gates() -> None:
    """The tables in docs/design.md drew other gates from the same distribution."""
    inputs = inputs_of(Case(1, 24, 64, 4096))
    for rule, published in zip(RULES, (0.402, 0.361), strict=True):
        assert share_kept(first_by_definition(inputs, rule), 4096) == pytest.approx(published, abs=0.05)


def test_case_is_read_and_counted() -> None:
    case = Case.parse("2x3x8x10")
    assert (case, str(case)) == (Case(2, 3, 8, 10), "2x3x8x10")
    # Two products of 2 T^2 D operations for each of six heads, half of them causal.
    assert case.flops(backward=False) == 6 * 2 * (2 * 100 * 8) / 2
    assert case.flops(backward=True) == 3.5 * case.flops(backward=False)
    for text in ("2x3x8", "2x3x8x0", "2x3x8x10x1", "axbxcxd", ""):
        with pytest.raises(ValueError, match=r"--case must be four positive integers BxHxDxT such as .*, got '"):
            Case.parse(text)


# The check


def test_sampled_rows_are_those_of_the_naive_reference() -> None:
    inputs = inputs_of(Case(2, 3, 8, 70), torch.float64)
    inputs = inputs._replace(log_f=inputs.log_f.double())
    sample = Sample.of(inputs, seed=0)
    assert len(sample.rows) == 64 and sample.heads == (0, 2) and sample.batch == 1
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    out, _ = naive_attention(*leaves, scale=inputs.scale)
    grads = torch.autograd.grad(out, leaves, sample.only(inputs.dout))
    for head in sample.heads:
        found = attend_densely(inputs, sample, head, torch.float64)
        torch.testing.assert_close(found["out"], out[1, sample.rows, head], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["q"], grads[0][1, sample.rows, head], rtol=1e-10, atol=1e-12)
        for name, grad in zip(("k", "v", "log_f"), grads[1:], strict=True):
            torch.testing.assert_close(found[name], grad[1, :, head], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [None, *RULES])
def test_own_attention_is_admitted(rule: Rule | None, dtype: torch.dtype) -> None:
    record = admit(own(rule), dtype)
    assert record["status"] == "measured", record
    assert set(record["errors"]) == {"out", "q", "k", "v", "log_f"}
    assert all(record["errors"][name] <= record["limits"][name] for name in record["errors"])
    assert (record["tiles_kept"] < 1.0) == (rule is not None)


def test_attention_without_gates_is_held_to_what_it_claims() -> None:
    flash = next(one for one in COMPETITORS if "FlashAttention" in one.name)
    record = admit(flash)
    assert record["status"] == "measured", record
    assert set(record["errors"]) == {"out", "q", "k", "v"}
    record = admit(replace(flash, gated=True))
    assert record["status"] == "wrong"
    assert record["reason"].startswith("output of head 0 is off by")


def spoiled(spoil: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Implementation:
    """Attention of inputs that are not quite those asked for."""
    return Implementation(
        "spoiled", lambda inputs: lambda *args: forgetting_attention(*spoil(*args), scale=inputs.scale), eps=EPS
    )


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
    bench = Bench(inputs_of(), "cpu", seed=0)
    record = bench.admit(spoiled(spoil))
    assert record["status"] == "wrong"
    assert record["reason"].startswith(named)
    assert not bench.runners


def test_control_the_spoiled_attention_is_right_unspoiled() -> None:
    assert admit(spoiled(lambda *args: args))["status"] == "measured"


def test_control_lost_pruning_is_found() -> None:
    record = admit(replace(own("tight"), tiles_kept=lambda inputs: 1.0))
    assert record["status"] == "wrong"
    assert record["reason"].startswith("keeps 100.0% of the tiles, where its rule keeps")


# Competitors


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = inputs_of(Case(1, 4, 16, 384))
    expected, _ = naive_attention(*inputs[:4], scale=inputs.scale)
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    for one in (one for one in COMPETITORS if "FlexAttention" in one.name):
        with torch.no_grad():
            out = one.prepare(inputs)(q, k, v, inputs.log_f).transpose(1, 2)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
        assert (one.tiles_kept(inputs) < 1.0) == (one.rule is not None)


def test_flex_block_mask_is_a_range_up_to_the_diagonal() -> None:
    first = torch.tensor([[[0, 0, 2, 1], [0, 1, 2, 3]]])
    mask = flex.causal_block_mask(torch.zeros(1, 2, 4 * flex.BLOCK), first)
    blocks = torch.arange(4)
    expected = (blocks >= first[..., None]) & (blocks <= blocks[:, None])
    assert torch.equal(mask.to_dense().bool(), expected)
    assert mask.kv_num_blocks.tolist() == [[[1] * 4] * 2]
    with pytest.raises(ValueError, match="multiples of 128 tokens, got 100"):
        flex.causal_block_mask(torch.zeros(1, 2, 100), None)


def test_what_fails_is_recorded_and_the_others_go_on() -> None:
    def fails(inputs: Inputs):
        raise RuntimeError("out of memory\nand a long story")

    broken = Implementation("broken", fails)
    absent = Implementation("absent", fails, missing=lambda device: f"not on {device}")
    record = run_case(CASE, [broken, absent, own(None)], Settings("cpu", torch.float32, rounds=1))
    assert [one["status"] for one in record["implementations"]] == ["failed", "missing", "measured"]
    assert record["implementations"][0]["reason"] == "RuntimeError: out of memory"
    assert record["implementations"][0]["detail"].endswith("and a long story")
    assert record["implementations"][1]["reason"] == "not on cpu"
    assert record["implementations"][2]["forward"]["ms"] > 0.0


def test_implementations_are_chosen_by_a_part_of_their_names() -> None:
    assert [one.name for one in chosen(["CUDNN", "tight"])] == [own_name("tight"), "cuDNN, no gate"]
    assert len(chosen([])) == len(OWN) + len(COMPETITORS)
    with pytest.raises(ValueError, match=r"--only must be part of one of \['foxlm', .*, got 'xformers'"):
        chosen(["xformers"])


# Times


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = interleaved({name: partial(order.append, name) for name in "ab"}, rounds=3, device="cpu")
    assert order == list("ab") * (2 + 2 * 3)
    for timing in times.values():
        assert 0.0 <= timing.p20 <= timing.ms <= timing.p80
        assert timing.spread >= 0.0


def timed(name: str, forward: float, both: float, kept: float = 1.0, boundaries: float | None = None) -> Record:
    record: Record = {"name": name, "tiles_kept": kept, "forward": {"ms": forward}, "forward_backward": {"ms": both}}
    return record if boundaries is None else record | {"boundaries": {"ms": boundaries}}


def test_bars_by_hand() -> None:
    case = {
        "implementations": [
            timed(own_name(None), 4.0, 20.0),
            timed(own_name("tight"), 1.5, 6.0, kept=0.25, boundaries=0.03),
            timed(CUDNN, 3.0, 10.0),
            {"name": own_name("paper"), "status": "wrong", "tiles_kept": 0.3},
        ],
        "open_gates": [timed(own_name(None), 4.0, 20.0), timed(own_name("tight"), 4.1, 20.2, boundaries=0.03)],
    }
    bars = attention_bars(case)
    assert bars["dense_rate_over_cudnn"] == {"forward": 0.75, "forward_backward": 0.5}
    assert bars["acp_over_kept"] == {"tight": {"forward": 1.5, "forward_backward": 1.2}}
    assert bars["vain_cost"]["tight"] == pytest.approx({"forward": 0.025, "forward_backward": 0.01})
    assert bars["boundaries_of_forward"] == {"tight": pytest.approx(0.02)}
    assert bars["dropped"] == {"tight": 0.75}
    assert attention_bars({"implementations": [], "open_gates": []}) == {}

    plain: Record = {"rule": None, "compiled": False, "step": {}, "tokens_per_second": 2.0}
    steps = [plain, plain | {"rule": "tight", "tokens_per_second": 3.0}, plain | {"rule": "paper", "compiled": True}]
    assert train_bars(steps) == {"acp_speedup": {"tight": 1.5}}


# The command


def test_attention_writes_results_and_their_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    arguments = ("--device", "cpu", "--dtype", "float32", "--rounds", "1", "--case", "1x4x16x256")
    result = invoke("attention", *arguments, "--out", str(out))
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert (results["schema"], results["kind"]) == (1, "attention")
    assert {"device", "commit", "torch", "triton", "cuda", "command"} <= set(results["run"])
    (case,) = results["cases"]
    assert case["case"] == "1x4x16x256" and case["ceiling_tflops"] > 0.0
    measured = {one["name"]: one for one in case["implementations"] if one["status"] == "measured"}
    for one in OWN:
        record = measured[one.name]
        dense = Case.parse(case["case"]).flops(backward=False) / record["forward"]["ms"] / 1e9
        assert record["forward"]["dense_tflops"] == pytest.approx(dense)
        assert record["forward"]["done_tflops"] == pytest.approx(dense * record["tiles_kept"])
        assert ("boundaries" in record) == (one.rule is not None)
    assert [one["status"] for one in case["open_gates"]] == ["measured"] * 3
    assert set(case["bars"]["vain_cost"]) == set(RULES)
    assert "| 1 x 4 x 16 x 256 | foxlm, ACP tight |" in result.output
    assert "cuDNN, no gate: not run: needs a GPU" in result.output


def test_attention_that_is_wrong_prints_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, **options):
        return forgetting_attention(q, k, v, 2.0 * log_f, **options)

    monkeypatch.setattr("foxlm.evaluation.speed.own.forgetting_attention", wrong)
    out = tmp_path / "results.json"
    result = invoke("attention", "--device", "cpu", "--only", "foxlm", "--rounds", "1", "--out", str(out))
    assert result.exit_code == 1
    assert "failed its check and was not timed: output of head 0 is off by" in result.output
    (case,) = json.loads(out.read_text())["cases"]
    assert [one["status"] for one in case["implementations"]] == ["wrong"] * 3
    assert not any(part in one for one in case["implementations"] for part in PARTS)


def test_readme_table_is_replaced_between_its_markers(tmp_path: Path) -> None:
    out, readme = tmp_path / "results.json", tmp_path / "README.md"
    assert not invoke("attention", "--device", "cpu", "--only", "foxlm", "--rounds", "1", "--out", str(out)).exit_code
    readme.write_text("before\n<!-- speed:attention -->\nold\n<!-- /speed:attention -->\nafter\n")
    for _ in range(2):
        result = invoke("table", str(out), "--readme", str(readme), "--case", "1x4x16x256")
        assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert text.startswith("before\n<!-- speed:attention -->\n")
    assert text.endswith("\n<!-- /speed:attention -->\nafter\n")
    assert "old" not in text and text.count("| foxlm |") == 1
    assert invoke("table", str(out)).output.strip() in text


def test_table_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    for text, message in (("{}", "must hold results of this benchmark"), ("nothing", "is not JSON")):
        file = tmp_path / "results.json"
        file.write_text(text)
        result = invoke("table", str(file))
        assert result.exit_code == 1 and message in result.stderr
    for text in ("", "<!-- /speed:train --><!-- speed:train -->", 2 * "<!-- speed:train --><!-- /speed:train -->"):
        with pytest.raises(
            ValueError, match="must hold the lines <!-- speed:train --> and <!-- /speed:train -->, once"
        ):
            report.insert(text, "train", "")
    one = {"kind": "attention", "run": dict.fromkeys(report._SAME_RUN, "a"), "settings": {"rounds": 1}, "cases": [1]}
    assert report.merged([one, one | {"cases": [2]}, {"kind": "train"}]) == [one | {"cases": [1, 2]}, {"kind": "train"}]
    for several in ([one, one | {"settings": {"rounds": 1, "model": "m"}}], [one | {"settings": {"model": "m"}}, one]):
        with pytest.raises(ValueError, match=r"must have the same (model|rounds), got"):
            report.merged(several)
    with pytest.raises(ValueError, match="must have the same rounds, got 1 and 2"):
        report.merged([one, one | {"settings": {"rounds": 2}}])
    results = {"cases": [{"case": "1x1x1x1"}]}
    with pytest.raises(ValueError, match=r"--case must be one of \['1x1x1x1'\], got '2x2x2x2'"):
        report.only_cases(results, ["2x2x2x2"])


def test_commit_is_given_where_it_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foxlm.evaluation.provenance._commit", lambda: "none")
    assert report.new_results("train", "cpu", 0, "abc", {})["run"]["commit"] == "abc"
    assert report.new_results("train", "cpu", 0, None, {})["run"]["commit"] == "none"
    monkeypatch.setattr("foxlm.evaluation.provenance._commit", lambda: "def")
    with pytest.raises(ValueError, match="--commit must not be given in a checkout, which is at def; got 'abc'"):
        report.new_results("train", "cpu", 0, "abc", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        (["attention", "--device", "cpu", "--rounds", "0"], "--rounds must be a positive integer, got 0"),
        (["attention", "--device", "cpu", "--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got"),
        (["attention", "--device", "cpu", "--case", "1x2"], "--case must be four positive integers BxHxDxT such as"),
        (["train", "--device", "cpu", "--tokens", "-1"], "--tokens must be a positive integer, got -1"),
        (["train", "--device", "cpu", "--layers", "0"], "--layers must be a positive integer, got 0"),
        (["train", "--device", "cpu", "--preset", "pro-7b"], "name must be one of"),
        (["decode", "--device", "cpu", "--new", "0"], "--new must be a positive integer, got 0"),
        (["decode", "--device", "cpu", "--batch", "0"], "--batch must be a positive integer, got 0"),
        (["decode", "--device", "cpu", "--only", "vLLM"], "--only must be part of one of ['foxlm, dynamic cache', "),
        (["prefill", "--device", "cpu", "--chunk", "0"], "--chunk must be a positive integer, got 0"),
        (
            ["prefill", "--device", "cpu", "--tokens", "64", "--tokens", "-3"],
            "--tokens must be a positive integer, got -3",
        ),
        (["prefill", "--device", "cpu", "--only", "vLLM"], "--only must be part of one of ['foxlm', "),
        (["prefill", "--device", "cpu", "--only", "compiled"], "--only must be part of one of ['foxlm', "),
        (["attention", "--device", "cpu", "--out", "/"], "--out must be a file, got the folder /"),
        (["attention", "--device", "cpu", "--rows", "2"], "--length, --rows and --join are of --model and --text"),
        (["train", "--device", "cpu", "--model", "x"], "--model and --text go together, got --model without --text"),
        (["train", "--device", "cpu", "--text", "x"], "--model and --text go together, got --text without --model"),
        (
            ["decode", "--device", "cpu", "--model", "x", "--preset", "pro-125m"],
            "--preset is of new models, got it with",
        ),
        (["decode", "--device", "cpu", "--join"], "--join is of --text, got it without"),
        (["table", "no-such-file.json"], "No such file"),
        (
            ["plot", "no-such-file.json", "--out", "x.svg"],
            "foxlm bench plot was removed; foxlm bench table",
        ),
        (["plan", "file.json", "--gpus", "8"], "foxlm bench plan was removed; docs/several_gpus.md has the formula"),
        (["plan", "--help"], "foxlm bench plan was removed"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_module_says_that_there_is_no_gpu() -> None:
    command = [sys.executable, "-m", "foxlm", "bench", "attention"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    # Before it, torchao says that it has no GPU either, where it is installed: transformers imports it.
    assert done.stderr.splitlines()[-1].startswith(
        "error: --device is cuda, but torch sees no CUDA GPU; --device cpu shows"
    )


# Training


def test_training_steps_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = invoke("train", "--device", "cpu", "--rounds", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert [one["name"] for one in results["steps"]] == [own_name(rule) for rule in (None, *RULES)]
    for one in results["steps"]:
        assert one["tokens_per_second"] == pytest.approx(256e3 / one["step"]["ms"])
        assert (one["tiles_kept"] < 1.0) == (one["rule"] is not None)
    assert set(results["bars"]["acp_speedup"]) == set(RULES)
    assert "| foxlm, ACP tight |" in result.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_the_model_have_the_benchmarks_decay_times(dtype: torch.dtype) -> None:
    model = build_fox("pro-760m", SIZES, "cpu", dtype)
    for layer in model.model.layers:
        bias = layer.get_parameter("self_attn.forget_gate.bias")
        assert bias.dtype == torch.float32
        assert layer.get_parameter("self_attn.q_proj.weight").dtype == dtype
        times = -1.0 / torch.nn.functional.logsigmoid(bias.detach().double())
        torch.testing.assert_close(times, spread_decay_times(4), rtol=1e-3, atol=0.0)


def test_control_a_step_with_wrong_attention_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_tight(model, rule: Rule | None) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.25 if rule != "tight" else 0.3

    monkeypatch.setattr(train, "set_pruning", break_tight)
    recipe = train.Recipe(Workload("cpu", sizes=SIZES), tokens=128, rounds=1)
    results = train.run_training(recipe)
    assert [one["status"] for one in results["steps"]] == ["measured", "measured", "wrong"]
    assert "step" not in results["steps"][2]
    assert "are off by" in results["steps"][2]["reason"]


def test_configuration_has_the_fields_that_turn_pruning_on() -> None:
    """transformers keeps an unknown field as an attribute: a renamed one would be set in vain."""
    assert {"acp_eps", "acp_rule"} <= set(FoxConfig.__dataclass_fields__)


# Decoding


def decode_recipe(device: str = "cpu", **options) -> decode.DecodeRecipe:
    return replace(decode.DecodeRecipe(Workload(device, sizes=SIZES), tokens=100, new=2, rounds=1), **options)


def build_models(decoders: Sequence[Decoder], recipe: decode.DecodeRecipe | None = None) -> decode.Models:
    return decode.build_models((recipe or decode_recipe()).workload, [one.family for one in decoders])


def run_decoding(decoders: list[Decoder], batch: int = 2) -> Record:
    return decode.run_batch(batch, build_models(decoders), decoders, decode_recipe())


def decoder(cache: str, rule: Rule | None = "tight", family: str = "foxlm") -> Decoder:
    return next(one for one in DECODERS if (one.family, one.cache, one.rule) == (family, cache, rule))


def test_decoding_is_measured(tmp_path: Path) -> None:
    out, readme = tmp_path / "results.json", tmp_path / "README.md"
    arguments = ("--device", "cpu", "--new", "2", "--rounds", "1", "--batch", "1", "--batch", "2")
    result = invoke("decode", *arguments, "--out", str(out))
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert [one["batch"] for one in results["batches"]] == [1, 2]
    for batch in results["batches"]:
        # Keys and values of two layers, 64 numbers of two bytes each.
        of_a_token = batch["batch"] * 2 * 2 * 64 * 2
        assert batch["kv_bytes"] == 256 * of_a_token
        assert [one["name"] for one in batch["decoders"]] == [one.name for one in DECODERS]
        for one in batch["decoders"]:
            assert one["status"] == "measured", one
            assert one["error"] <= one["limit"] < 0.1
            assert one["tokens_per_second"] == pytest.approx(1e3 * batch["batch"] / one["step"]["ms"])
            assert one["read_bytes"] == pytest.approx(one["keys_kept"] * batch["kv_bytes"])
            assert (one["keys_kept"] < 1.0) == (one["rule"] is not None)
            expected = {"dynamic": 261 * of_a_token, "static": 320 * of_a_token, "paged": one["stored_bytes"]}
            assert one["stored_bytes"] > 0
            assert one["stored_bytes"] == expected[one["cache"]]
            assert (one["compiled"], one["device_ms"], one["host_bound"]) == (False, None, None)
        assert len(batch["bars"]) == 6
    assert "| 2 | foxlm, ACP tight, paged cache |" in result.output
    # What is wanted of a GPU is not asked of a CPU.
    assert "Figures of no use" in result.output and "an H100" not in result.output
    readme.write_text("<!-- speed:decode -->\n<!-- /speed:decode -->\n")
    assert invoke("table", str(out), str(out), "--readme", str(readme)).exit_code == 0
    assert readme.read_text().count("| 2 | foxlm, ACP tight, paged cache |") == 2


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
    results = run_decoding([decoder("dynamic"), decoder("static"), decoder("static", None, "Llama")])
    assert [one["status"] for one in results["decoders"]] == ["measured", "wrong", "measured"]
    assert "step" not in results["decoders"][1]
    assert results["decoders"][1]["reason"].startswith("logits are off by")


def test_a_decoder_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Session) -> None:
        if isinstance(self.cache, StaticCache):
            raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(Session, "reserve", fails)
    results = run_decoding([decoder("static"), decoder("dynamic")])
    assert [one["status"] for one in results["decoders"]] == ["failed", "measured"]
    assert results["decoders"][0]["reason"] == "OutOfMemoryError: no room"
    assert results["bars"] == {}


def test_context_in_parts_is_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = decode_recipe()
    model = build_models([])["foxlm"].double()
    ids = torch.randint(256, (2, 70))
    logits = []
    for longest in (1000, 32):
        monkeypatch.setattr("foxlm.evaluation.speed.sessions._LONGEST_CHUNK", longest)
        session = Session(decoder("static"), model, greedy_step, 2, recipe.length)
        logits.append(session.fill(ids))
        assert session.cache.get_seq_length() == 70
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)


def test_keys_kept_are_those_of_the_definition() -> None:
    model = build_models([])["foxlm"]
    ids = torch.randint(256, (2, 600))
    kept = observed.keys_kept(model, ids)
    session = Session(decoder("dynamic"), model, greedy_step, 2, 601)
    session.fill(ids)
    ids = torch.cat([ids, session.ids], dim=1)
    with torch.no_grad(), record_attention(model) as layers:
        model(ids, use_cache=False)
    for rule in RULES:
        first = torch.stack([kept_from(one, math.log(EPS), rule, block_k=64)[..., -1] for one in layers])
        # The rule `paper` has another bound there.
        tolerance = 1e-3 if rule == "tight" else 0.1
        assert kept[rule] == pytest.approx(1.0 - first.double().mean().item() / 601, abs=tolerance)
    assert kept["tight"] <= kept["paper"] < 0.8


def test_error_is_that_of_the_worst_token() -> None:
    exact = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    found = torch.tensor([[[3.0, 4.5], [1.0, 10.0]]])
    assert logits.largest_error(found, exact) == pytest.approx(0.1)
    assert math.isnan(logits.largest_error(torch.full_like(exact, math.nan), exact))


@pytest.mark.parametrize("guess", [1, 30, 300])
@pytest.mark.parametrize("most", [1, 2, 100, 256])
def test_largest_batch_is_found(most: int, guess: int) -> None:
    for limit in (0, 1, 2, 3, 31, 32, 37, 1000):
        tried: list[int] = []

        def fits(batch: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(batch)
            return batch <= limit

        right = min(limit, most)
        assert right - right // 16 <= largest_batch.largest(fits, most, guess) <= right
        assert len(tried) == len(set(tried)) <= 13


def test_largest_batches_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"static": 3, "paged": 10}

    def fill(self: Session, ids: Tensor) -> Tensor:
        if len(ids) > limits["static" if isinstance(self.cache, StaticCache) else "paged"]:
            raise torch.OutOfMemoryError
        return fill_session(self, ids)

    fill_session = Session.fill
    monkeypatch.setattr(Session, "fill", fill)
    monkeypatch.setattr(largest_batch, "_MOST", {"cpu": 256})
    out = tmp_path / "results.json"
    result = invoke("decode", "--device", "cpu", "--tokens", "20", "--largest-batch", "--out", str(out))
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert results["batches"] == []
    (found,) = results["largest_batch"]
    assert (found["static"]["batch"], found["paged"]["batch"]) == (3, 10)
    assert found["bars"] == {"largest_batch": {"value": pytest.approx(10 / 3), "at_least": 2.5}}
    assert "Largest batch, up to 256, at 20 tokens: static 3, paged 10." in result.output


def test_decoding_bars_by_hand() -> None:
    def timed(one: Decoder, ms: float, stored: float = 0.0) -> Record:
        record: Record = {"family": one.family, "cache": one.cache, "rule": one.rule, "stored_bytes": stored}
        return record | {"step": {"ms": ms}, "tokens_per_second": 8e3 / ms}

    records = [
        timed(decoder("static", None), 6.0),
        timed(decoder("static"), 3.0),
        timed(decoder("paged"), 4.0, stored=30.0),
        timed(decoder("static", None, "Llama"), 7.5),
        {"family": "foxlm", "cache": "dynamic", "rule": None, "status": "wrong"},
    ]
    assert decode_bars({"batch": 8, "kv_bytes": 100.0, "decoders": records}) == {
        "step_ms": {"value": 3.0},
        "tokens_per_second": {"value": pytest.approx(8e3 / 3.0), "at_least": 2000.0},
        "acp_speedup": {"value": 2.0, "at_least": 1.8},
        "paged_bytes": {"value": 0.3, "at_most": 0.4},
        "paged_rate": {"value": pytest.approx(0.75), "at_least": 0.9},
        "rate_over_llama": {"value": pytest.approx(2.5), "at_least": 2.0},
    }
    bars = decode_bars({"batch": 1, "kv_bytes": 100.0, "decoders": records})
    assert bars["step_ms"] == {"value": 3.0, "at_most": 2.5}
    assert bars["acp_speedup"] == {"value": 2.0}
    assert decode_bars({"batch": 1, "decoders": []}) == {} == largest_batch_bars(3, 0)


def test_models_have_the_same_sizes() -> None:
    models = build_models(DECODERS)
    shapes = [
        {name: tuple(weight.shape) for name, weight in one.named_parameters() if "_proj" in name or "embed" in name}
        for one in models.values()
    ]
    assert shapes[1] == {name: shape for name, shape in shapes[0].items() if name in shapes[1]}
    assert all(one.dtype == torch.bfloat16 and not one.training for one in models.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_decoding_is_compiled_and_replayed() -> None:
    recipe = decode_recipe(device="cuda", tokens=1000)
    results = decode.run_batch(2, build_models(DECODERS, recipe), DECODERS, recipe)
    assert "error" not in results
    for one in results["decoders"]:
        assert one["status"] == "measured", one
        assert one["device_ms"] > 0.0 and one["peak_bytes"] > one["stored_bytes"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_all_that_is_installed_is_measured() -> None:
    record = run_case(Case(1, 4, 64, 1024), chosen([]), Settings("cuda", rounds=2))
    assert "error" not in record
    for one in record["implementations"]:
        assert one["status"] in ("measured", "missing"), one
        assert one["status"] == "missing" or one["peak_bytes"] > 0
