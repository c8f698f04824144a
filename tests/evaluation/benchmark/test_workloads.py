"""The speed benchmarks on prompts, and on a model and text of the user's; their JSON and their picture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from foxlm import FoxForCausalLM
from foxlm.cli.bench import app
from foxlm.evaluation.gates import kept_from
from foxlm.evaluation.recording import record_attention
from foxlm.evaluation.speed import options, prefill, report, tables
from foxlm.evaluation.speed.bars import prefill_bars
from foxlm.evaluation.speed.competitors import COMPETITORS
from foxlm.evaluation.speed.correctness import Sample, attend_densely
from foxlm.evaluation.speed.decode import build_models
from foxlm.evaluation.speed.implementations import EPS, RULES, Attend, share_kept
from foxlm.evaluation.speed.inputs import Case, Inputs
from foxlm.evaluation.speed.models import CPU_SIZES
from foxlm.evaluation.speed.observed import tiles_kept
from foxlm.evaluation.speed.own import own
from foxlm.evaluation.speed.recorded import record_inputs
from foxlm.evaluation.speed.runner import Bench
from foxlm.evaluation.speed.sessions import Session
from foxlm.evaluation.speed.workload import Workload
from models import tiny_config
from naive import naive_attention

SIZES = tuple(CPU_SIZES.items())


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*arguments[:1], *(() if arguments[0] == "table" else ON_CPU), *arguments[1:]])


ON_CPU = ("--device", "cpu", "--rounds", "1")


def saved_model(folder: Path, variant: str = "pro", **overrides: Any) -> Path:
    torch.manual_seed(0)
    FoxForCausalLM(tiny_config(variant, initializer_range=0.2, **overrides)).save_pretrained(folder / "mine")
    return folder / "mine"


def saved_text(folder: Path, tokens: int = 900) -> Path:
    path = folder / "text.npy"
    np.save(path, np.random.default_rng(0).integers(2, 97, tokens))
    return path


def of_users(folder: Path, variant: str = "pro", **overrides: Any) -> tuple[str, ...]:
    return "--model", str(saved_model(folder, variant, **overrides)), "--text", str(saved_text(folder))


# Prompts


def run_prefill(ways=prefill.PREFILLERS, batch: int = 2, tokens: int = 200) -> dict[str, Any]:
    workload = Workload("cpu", sizes=SIZES)
    models = build_models(workload, [one.decoder.family for one in ways])
    recipe = prefill.PrefillRecipe(workload, chunk=64, rounds=1)
    return prefill.run_prompts(batch, tokens, models, ways, recipe)


def test_prompts_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = invoke("prefill", "--tokens", "200", "--tokens", "60", "--batch", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    long, short = json.loads(out.read_text())["prompts"]
    assert [one["name"] for one in long["ways"]] == [one.name for one in prefill.PREFILLERS]
    # No longer than a part.
    assert [one["name"] for one in short["ways"]] == [one.name for one in prefill.PREFILLERS if not one.chunked]
    for one in long["ways"]:
        assert one["status"] == "measured" and one["error"] <= one["limit"] < 0.1, one
        assert one["tokens_per_second"] == pytest.approx(400e3 / one["first_token"]["ms"])
        assert (one["tiles_kept"] < 1.0) == (one["rule"] is not None)
        assert one["stored_bytes"] > 0
        if one["cache"] == "dynamic" and not one["chunked"]:
            assert one["stored_bytes"] == long["kv_bytes"]
    assert set(long["bars"]) == {"whole", "in_parts"}
    assert "| 2 x 200 | foxlm, ACP tight, in parts |" in result.stdout
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed:prefill -->\n<!-- /speed:prefill -->\n")
    assert invoke("table", str(out), "--readme", str(readme)).exit_code == 0
    assert "| 2 x 200 | Llama, in parts |" in readme.read_text()


def test_control_a_prompt_whose_parts_forget_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Session.fill

    def forgetting(self: Session, ids: Tensor, chunk: int, forward: Any) -> Tensor:
        if chunk < ids.shape[1]:
            ids = ids[:, chunk:]
        return fill(self, ids, chunk, forward)

    monkeypatch.setattr(Session, "fill", forgetting)
    ways = [prefill.PREFILLERS[0], next(one for one in prefill.PREFILLERS if one.chunked)]
    record = run_prefill(ways)
    assert [one["status"] for one in record["ways"]] == ["measured", "wrong"]
    assert record["ways"][1]["reason"].startswith("logits are off by")
    assert "first_token" not in record["ways"][1]


def test_a_way_that_fails_or_gives_nan_ends_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill = Session.fill

    def broken(self: Session, ids: Tensor, chunk: int, forward: Any) -> Tensor:
        logits = fill(self, ids, chunk, forward)
        if not hasattr(forward, "config") or forward.config.model_type == "llama":
            raise torch.OutOfMemoryError("no room\nat all")
        return logits * torch.nan if chunk < ids.shape[1] else logits

    monkeypatch.setattr(Session, "fill", broken)
    out = tmp_path / "results.json"
    result = invoke("prefill", "--tokens", "100", "--out", str(out))
    assert result.exit_code == 1
    assert "Llama: failed: OutOfMemoryError: no room" in result.stdout
    assert "in parts: failed its check and was not timed: logits are off by nan" in result.stdout
    # JSON knows no NaN.
    found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    statuses = {one["name"]: one["status"] for one in found["prompts"][0]["ways"]}
    assert (statuses["foxlm"], statuses["foxlm, in parts"], statuses["Llama"]) == ("measured", "wrong", "failed")


def test_prefill_bars_by_hand() -> None:
    def way(family: str, rule: str | None, rate: float, chunked: bool = False) -> dict[str, Any]:
        record = {"family": family, "cache": "dynamic", "rule": rule, "chunked": chunked, "compiled": False}
        return record | {"first_token": {}, "tokens_per_second": rate}

    ways = [
        way("foxlm", None, 10.0),
        way("foxlm", "tight", 25.0),
        way("Llama", None, 5.0),
        way("foxlm", "paper", 1.0, True),
    ]
    assert prefill_bars(ways) == {
        "whole": {"acp_speedup": {"tight": 2.5}, "over_llama": {"none": 2.0, "tight": 5.0}},
    }
    assert prefill_bars([{"family": "foxlm", "status": "wrong"}]) == {}


@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates"])
def test_tiles_kept_are_those_of_the_definition(variant: str) -> None:
    torch.manual_seed(0)
    model = FoxForCausalLM(tiny_config(variant, decay_time_max=5.0)).eval()
    ids = torch.randint(2, 97, (2, 300))
    kept = tiles_kept(model, ids)
    with torch.no_grad(), record_attention(model) as layers:
        model.model(ids, use_cache=False)
    # The rule `paper` has another bound there with QK-norm.
    for rule in RULES[1:] if variant != "llama" else RULES:
        first = torch.stack([kept_from(one, np.log(EPS), rule, 128, 64) for one in layers]).flatten(0, 1)
        assert kept[rule] == pytest.approx(share_kept(first, 300), abs=1e-9)
    assert kept["tight"] < kept[None] == 1.0
    gateless = FoxForCausalLM(tiny_config("gateless"))
    assert tiles_kept(gateless, ids) == {None: 1.0}


# Attention of a model and text


@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates", "multi-query", "rope"])
def test_attention_of_a_model_is_what_enters_it(variant: str, tmp_path: Path) -> None:
    model, text = saved_model(tmp_path, variant), saved_text(tmp_path)
    recorded = record_inputs(Workload("cpu", model=str(model), text=text), 2, 160, torch.float32)
    inputs = recorded.inputs
    kv_heads = 1 if variant == "multi-query" else 2
    assert recorded.case == Case(4, 4, 8, 160, kv_heads) and inputs.k.shape == (4, 160, kv_heads, 8)
    assert recorded.facts["model"] == "mine" and recorded.facts["text"] == "text.npy"
    fox = FoxForCausalLM.from_pretrained(model)
    ids = torch.from_numpy(np.load(text)[:320].reshape(2, 160))
    with torch.no_grad(), record_attention(fox) as layers:
        fox.model(ids, use_cache=False)
    torch.testing.assert_close(inputs.q, torch.cat([one.q for one in layers]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.log_f, torch.cat([one.log_f for one in layers]), rtol=1e-4, atol=1e-4)
    assert inputs.centers == (variant == "llama") == (inputs.logit_bound is None)
    if isinstance(inputs.logit_bound, Tensor):
        expected = torch.stack(
            [fox.model.layers[n // 2].self_attn.logit_bound(torch.float32).expand(4) for n in range(4)]
        )
        torch.testing.assert_close(inputs.logit_bound, expected)
    bench = Bench(inputs, "cpu", seed=0)
    for one in (own(None), *(own(rule) for rule in RULES)):
        record = bench.admit(one)
        assert record["status"] == "measured", record
    for one in COMPETITORS:
        if one.missing("cpu") is None:
            assert bench.admit(one)["status"] == "measured", bench.records[-1]


def test_sampled_rows_of_grouped_heads_are_those_of_the_naive_reference() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_f = torch.nn.functional.logsigmoid(normal(2, 50, 2))
    inputs = Inputs(
        normal(2, 50, 4, 8), normal(2, 50, 1, 8), normal(2, 50, 1, 8), log_f, normal(2, 50, 4, 8), 0.3, None
    )
    sample = Sample.of(inputs, seed=0)
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    q, k, v, f = leaves
    out, _ = naive_attention(
        q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2), f.repeat_interleave(2, 2), scale=inputs.scale
    )
    grads = torch.autograd.grad(out, leaves, sample.only(inputs.dout))
    for head in sample.heads:
        found = attend_densely(inputs, sample, head, torch.float64)
        torch.testing.assert_close(found["q"], grads[0][1, sample.rows, head], rtol=1e-9, atol=1e-10)
        for name, grad, index in (("k", grads[1], 0), ("v", grads[2], 0), ("log_f", grads[3], head // 2)):
            torch.testing.assert_close(found[name], grad[1, :, index], rtol=1e-9, atol=1e-10)


def test_control_a_query_head_lost_from_its_group_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, heads, 8, generator=generator) for heads in (4, 2, 2))
    log_f = torch.nn.functional.logsigmoid(torch.randn(1, 150, 4, generator=generator))
    inputs = Inputs(q, k, v, log_f, torch.randn(q.shape, generator=generator), 0.3, None)
    right = own(None)

    def lossy(of: Inputs) -> Attend:
        attend = right.prepare(of)
        # The second head of each group gives its keys and values no gradient.
        kept = torch.tensor([True, False, True, False])[:, None]
        return lambda *args: torch.where(
            kept, attend(*args), attend(args[0], args[1].detach(), args[2].detach(), args[3])
        )

    assert Bench(inputs, "cpu", seed=0).admit(right)["status"] == "measured"
    record = Bench(inputs, "cpu", seed=0).admit(replace(right, prepare=lossy))
    assert record["status"] == "wrong" and record["reason"].startswith("gradient of k")


def test_the_commands_measure_a_model_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = of_users(tmp_path)
    out = tmp_path / "results.json"
    for command, arguments in (
        ("attention", ("--length", "150", "--rows", "2", "--only", "foxlm")),
        ("train", ("--tokens", "100")),
        ("prefill", ("--tokens", "200", "--only", "tight", "--batch", "6")),
        ("decode", ("--tokens", "100", "--new", "2", "--batch", "1", "--only", "tight, static")),
    ):
        monkeypatch.setattr("sys.argv", ["foxlm", "bench", command, *given, *arguments, "--out", str(out)])
        result = invoke(command, *given, *arguments, "--out", str(out), "--json")
        assert result.exit_code == 0, result.output
        results = json.loads(result.stdout)
        assert results == json.loads(out.read_text())
        assert str(tmp_path) not in result.stdout
        assert results["run"]["command"].startswith(f"foxlm bench {command} --model mine --text text.npy")
        drawn = tables.render(results)
        assert "Figures of no use" in drawn and "`mine`" in drawn and "`text.npy`" in drawn
        assert "on an H100" not in drawn
        if command == "attention":
            (case,) = results["cases"]
            assert (case["case"], case["kv_heads"], case["open_gates"]) == ("4x4x8x150", 2, [])
            assert [one["status"] for one in case["implementations"]] == ["measured"] * 3
        if command == "prefill":
            assert results["prompts"][0]["text_rows"] == 4
            assert "the text has 4 different sequences, which repeat" in drawn


def test_a_model_without_forget_gates_is_measured_as_what_it_is_or_refused(tmp_path: Path) -> None:
    given = of_users(tmp_path, "gateless", use_key_shift=False)
    out = ("--out", str(tmp_path / "results.json"))
    result = invoke("attention", *given, *out)
    assert result.exit_code == 1 and "--model must have forget gates to be measured" in result.stderr
    result = invoke("decode", *given, *out, "--only", "tight")
    assert result.exit_code == 1 and "--model has no forget gates" in result.stderr
    result = invoke("decode", *given, *out, "--largest-batch")
    assert result.exit_code == 1 and "--largest-batch compares what pruning frees" in result.stderr
    result = invoke("prefill", *given, *out, "--tokens", "100", "--only", "foxlm", "--json")
    assert result.exit_code == 0, result.output
    ways = json.loads(result.stdout)["prompts"][0]["ways"]
    assert [one["name"] for one in ways] == ["foxlm", "foxlm, in parts"]
    result = invoke("train", *given, *out, "--tokens", "100", "--json")
    assert result.exit_code == 0, result.output
    assert [one["name"] for one in json.loads(result.stdout)["steps"]] == ["foxlm"]


def test_what_is_no_fox_or_too_short_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).save_pretrained(tmp_path / "llama")
    model, text = saved_model(tmp_path), saved_text(tmp_path)
    wide = tmp_path / "wide.npy"
    np.save(wide, np.full(300, 97))
    words = tmp_path / "words.txt"
    words.write_text("words")
    for source, read, more, message in (
        (tmp_path / "llama", text, (), "--model must be a FoX language model, got LlamaForCausalLM"),
        (
            model,
            text,
            ("--tokens", "5000"),
            "has no 5000 tokens in a row, at most 900; joining documents may give longer",
        ),
        (model, wide, (), "must hold tokens below 97, the model's, got 97"),
        (model, tmp_path / "none.npy", (), "No such file"),
        (model, words, (), "words.txt is text, which needs a model with a tokenizer; without one give .npy"),
        (tmp_path / "nothing", text, (), "nothing"),
    ):
        out = ("--out", str(tmp_path / "results.json"))
        result = invoke("prefill", "--model", str(source), "--text", str(read), *more, *out)
        assert result.exit_code == 1 and message in result.stderr, result.stderr
        # After the bar of transformers, which ends no line.
        assert result.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "results.json").exists()
    result = invoke("attention", "--model", str(model), "--text", str(text), "--length", "500", "--rows", "2")
    assert result.exit_code == 1 and "has 1 rows of 500 tokens, got 2 as --rows" in result.stderr


# Results


def published() -> dict[str, Any]:
    """Results as an earlier version wrote them: without rates of a copy, and without what says a GPU."""
    timing = {"ms": 2.0, "spread": 0.01, "dense_tflops": 400.0, "done_tflops": 200.0, "of_ceiling": 0.25}
    one = {"name": "foxlm, ACP tight", "rule": "tight", "gated": True, "gate_gradient": True, "status": "measured"}
    one |= {"tiles_kept": 0.5, "peak_bytes": 2e9, "forward": timing, "forward_backward": timing}
    case = {"case": "2x3x64x128", "ceiling_tflops": 800.0, "implementations": [one], "open_gates": [], "bars": {}}
    run = dict.fromkeys(report._SAME_RUN, "a") | {"device": "NVIDIA H100", "foxlm": "0.1.0", "commit": "abc"}
    settings = {"dtype": "bfloat16", "rounds": 15, "eps": EPS, "tile": [128, 64]}
    return {"schema": 1, "kind": "attention", "run": run, "settings": settings, "cases": [case]}


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(published()))
    result = invoke("table", str(file))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("NVIDIA H100; torch a,")
    assert "| 2 x 3 x 64 x 128 | foxlm, ACP tight | 50% | 2.00 | 2.00 | 400 / 400 | 25% / 25% | 2.0 |" in result.stdout
    assert json.loads(invoke("table", str(file), "--json").stdout) == [published()]


def test_folders_do_not_get_into_results(tmp_path: Path) -> None:
    assert report._without_folders(f"--model={tmp_path}/mine") == "--model=mine"
    assert report._without_folders("fla-hub/model") == "fla-hub/model"
    assert report._without_folders("2x24x64x16384") == "2x24x64x16384"
    with pytest.raises(ValueError, match="--out must be a file, got the folder"):
        options.require_writable(tmp_path)
