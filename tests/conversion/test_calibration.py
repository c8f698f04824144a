"""Calibrated grafts: sinks that stand for the separator, what is skipped and what it costs as measured, and errors."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from base_models import SIX, base, logits
from foxlm import FoxForCausalLM
from foxlm.cli import app
from foxlm.conversion.calibration import Calibration, calibrate, read_sinks
from foxlm.conversion.graft import graft
from foxlm.conversion.recall import with_recall
from models import assert_close, tokens
from word_tokenizer import word_tokenizer

SEPARATOR = 5


def only_sinks(model: Any) -> Calibration:
    """A calibration whose gates never forget."""
    probe = graft(model, forget_gate="none").eval()
    heads = torch.full((4, 4), math.inf, dtype=torch.float64)
    return Calibration(SEPARATOR, 512, 0.5, math.inf, heads, *read_sinks(probe, SEPARATOR), heads, heads, {}, {})


def after_separator(length: int = 40) -> Tensor:
    ids = tokens(2, length)
    ids[:, 0] = SEPARATOR
    return ids


# The base's function


@torch.no_grad()
@pytest.mark.parametrize("name", [*SIX, "llama, biases", "llama, yarn", "qwen3, biases, multi-head", "olmo2, linear"])
def test_sinks_of_the_separator_change_nothing_after_it(name: str) -> None:
    model = base(name)
    calibration = only_sinks(model)
    ids = after_separator()
    expected = model(ids).logits
    for output_gate in (False, True):
        grafted = graft(model, calibration=calibration, output_gate=output_gate).eval()
        for implementation in ("fox", "sdpa", "eager"):
            grafted.set_attn_implementation(implementation)
            assert_close(grafted(ids).logits, expected, 1e-5)


@torch.no_grad()
def test_a_sink_that_is_another_shows() -> None:
    """The negative control of the test above, for every key and value."""
    model = base()
    grafted = graft(model, calibration=only_sinks(model)).eval()
    ids = after_separator()
    expected = model(ids).logits
    for layer in grafted.model.layers:
        sink: Any = layer.self_attn.sink
        for weight in (sink.key, sink.value):
            for head in range(2):
                kept = weight[head].clone()
                weight[head] += 0.3
                with pytest.raises(AssertionError, match="differs"):
                    assert_close(grafted(ids).logits, expected, 1e-5)
                weight[head] = kept
    assert_close(grafted(ids).logits, expected, 1e-5)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(logits(grafted), logits(model), 1e-5)


def test_sinks_are_saved_and_generation_is_the_base_models(tmp_path: Path) -> None:
    model = base()
    graft(model, calibration=only_sinks(model)).save_pretrained(tmp_path)
    grafted: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(grafted) is FoxForCausalLM
    assert (grafted.config.attention_sink, grafted.config.sink_token_id) == ("learned", SEPARATOR)
    ids = after_separator(9)
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(grafted.generate(ids, **how), model.generate(ids, **how))


# What is measured


@pytest.fixture(scope="module")
def small() -> Any:
    """A Llama whose heads look near and far."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(97, (1, 1024))
    ids[:, 0] = SEPARATOR
    return ids


@pytest.fixture(scope="module")
def calibrated(small: Any, rows: Tensor) -> Calibration:
    return calibrate(graft(small, forget_gate="none").eval(), rows, skip=0.4)


def test_as_much_is_skipped_as_was_asked_for(calibrated: Calibration) -> None:
    assert calibrated.decay_times.shape == calibrated.reach.shape == calibrated.cost.shape == (2, 4)
    measured, tight = (calibrated.skipped[rule].mean().item() for rule in ("measured", "tight"))
    # A step of one head's decay time, of eight heads, is a few percent.
    assert 0.38 < measured < 0.5
    assert tight < measured
    costs = list(calibrated.frontier.values())
    assert list(calibrated.frontier)[:3] == [0.1, 0.2, 0.3]
    assert costs == sorted(costs) and costs[0] < costs[-1]


@torch.no_grad()
def test_costs_are_those_of_the_whole_model(small: Any, rows: Tensor) -> None:
    """The second-order estimate of one head's cost, beside the divergence of the model's predictions."""
    probe = graft(small, forget_gate="none").eval()
    calibration = calibrate(probe, rows, skip=0.2)
    log_p = small(rows).logits.log_softmax(-1)
    found, expected = [], []
    for layer, head in (calibration.decay_times < math.inf).nonzero().tolist():
        times = torch.full_like(calibration.decay_times, math.inf)
        times[layer, head] = calibration.decay_times[layer, head]
        log_q = graft(small, calibration=calibration, decay_times=times).eval()(rows).logits.log_softmax(-1)
        found.append(calibration.cost[layer, head].item())
        expected.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    assert len(found) >= 2
    np.testing.assert_allclose(found, expected, rtol=0.5)


def test_heads_that_share_keys_may_share_gates(small: Any, rows: Tensor) -> None:
    probe = graft(small, forget_gate="none").eval()
    calibration = calibrate(probe, rows, skip=0.3, forget_gate_heads="key_value")
    assert calibration.decay_times.shape == (2, 2) and calibration.reach.shape == (2, 4)
    assert calibration.skipped["measured"].mean() > 0.28
    model = graft(small, calibration=calibration, forget_gate_heads="key_value")
    assert model.config.num_forget_gates == 2


def test_no_head_exceeds_the_longest_decay_time(small: Any, rows: Tensor) -> None:
    probe = graft(small, forget_gate="none").eval()
    calibration = calibrate(probe, rows, skip=0.1, longest=100.0)
    free = calibrate(probe, rows, skip=0.1)
    assert calibration.longest == 100.0 and free.longest == math.inf
    assert calibration.decay_times.max() <= 100.0 < free.decay_times.max()
    # More than was asked for: decay times of 100 tokens skip so much of 1,024.
    assert calibration.skipped["measured"].mean() > 0.09
    model: Any = graft(small, calibration=calibration)
    times = [-1.0 / nn.functional.logsigmoid(x.self_attn.forget_gate.bias.double()) for x in model.model.layers]
    torch.testing.assert_close(torch.stack(times), calibration.decay_times, rtol=1e-5, atol=0.0)
    assert calibrate(probe, rows, skip=0.1, longest=8.0).decay_times.unique().tolist() == pytest.approx([8.0])


def test_gradients_and_weights_stay_as_they_were(small: Any, rows: Tensor) -> None:
    probe = graft(small, forget_gate="none").eval()
    calibrate(probe, rows, skip=0.1)
    assert all(weight.requires_grad and weight.grad is None for weight in probe.parameters())
    assert not any(module._forward_pre_hooks for module in probe.modules())


# Errors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"skip": 0.0}, r"skip must be a share in \(0, 1\), got 0.0"),
        ({"skip": 0.99}, r"skip must be at most 0\.\d\d, what decay times of 8 tokens skip of rows of 1024, got 0.99"),
        ({"longest": 7.9}, "longest must be a decay time of at least 8 tokens, got 7.9"),
        ({"longest": math.nan}, "longest must be a decay time of at least 8 tokens, got nan"),
        ({"rows": torch.zeros(2, 200, dtype=torch.int64)}, "rows must be longer than 256 tokens, got 200"),
        ({"rows": torch.zeros(0, 300, dtype=torch.int64)}, r"rows must be int64 tokens .* got torch.int64 \[0, 300\]"),
        ({"rows": torch.tensor([[1], [2]]).expand(2, 300)}, "all begin with the same"),
        ({"rows": torch.full((1, 300), 97)}, r"rows must hold tokens in \[0, 97\)"),
        ({"forget_gate_heads": "all"}, "forget_gate_heads must be"),
    ],
)
def test_names_what_it_cannot_use(small: Any, rows: Tensor, change: dict[str, Any], named: str) -> None:
    probe = graft(small, forget_gate="none").eval()
    with pytest.raises(ValueError, match=named):
        calibrate(probe, **({"rows": rows} | change))


def test_needs_a_model_without_gates_and_its_own_calibration(small: Any, rows: Tensor, calibrated: Calibration) -> None:
    with pytest.raises(ValueError, match="model must be a FoX model without forget gates"):
        calibrate(graft(small), rows)
    with pytest.raises(ValueError, match=r"calibration must be of this model, .* \[4, 2, 8\], got \[2, 2, 8\]"):
        graft(base(), calibration=calibrated)
    with pytest.raises(ValueError, match="calibration has no effect with forget_gate 'none'"):
        graft(small, calibration=calibrated, forget_gate="none")


@pytest.mark.parametrize(("length", "share", "again"), [(300, 0.25, 64), (300, 0.5, 128), (65, 0.5, 32), (64, 0.5, 0)])
def test_rows_repeat_passages_at_their_end(length: int, share: float, again: int) -> None:
    rows = torch.arange(3 * length).view(3, length)
    asked = with_recall(rows, share, seed=4)
    kept = length - again
    assert torch.equal(asked[:, :kept], rows[:, :kept])
    for row, text in zip(asked[:, kept:].unflatten(1, (-1, 32)), rows, strict=True):
        firsts = row[:, 0]
        assert torch.equal(row, firsts[:, None] + torch.arange(32))
        # Not the separator, and of what is kept.
        assert (firsts > text[0]).all() and (firsts + 31 < text[0] + kept).all()
        assert len(firsts.unique()) == len(firsts)
    assert torch.equal(asked, with_recall(rows, share, seed=4))
    assert torch.equal(with_recall(rows, 0.0), rows)


@pytest.mark.parametrize("share", [-0.1, 0.51, math.nan])
def test_what_cannot_be_repeated_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=r"recall must be a share of a row in \[0, 0.5\], got "):
        with_recall(torch.zeros(1, 300, dtype=torch.int64), share)
    with pytest.raises(ValueError, match=r"rows must be int64 tokens \[N, T\], got torch.float32 \[300\]"):
        with_recall(torch.zeros(300), 0.25)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer of words, and texts."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained(folder / "llama")
    word_tokenizer().save_pretrained(folder / "llama")
    return folder


def invoke(folder: Path, out: Path, text: Path, *options: str):
    arguments = ["graft", str(folder / "llama"), str(out), "--calibrate", str(text), "--device", "cpu", *options]
    return CliRunner().invoke(app, arguments)


def text_file(folder: Path, words: int = 1200, seed: int = 2) -> Path:
    torch.manual_seed(seed)
    path = folder / f"{words} by {seed}.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(90, (words,)).tolist()))
    return path


def test_command_writes_a_calibrated_folder_and_says_what_it_costs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox"
    result = invoke(
        folder,
        out,
        text_file(folder),
        "--skip",
        "0.2",
        "--rows",
        "2",
        "--separator",
        "<eos>",
        "--longest",
        "900",
        "--rope-factor",
        "2",
        "--recall",
        "0.125",
    )
    assert result.exit_code == 0, result.output
    report = json.loads((out / "calibration.json").read_text())
    assert (report["length"], report["settings"]["rows"], report["settings"]["separator"]) == (512, 2, "<eos>")
    assert 0.15 < report["skipped"]["measured"] < 0.3 and report["longest"] == 900.0
    assert max(max(times) for times in report["by_head"]["decay_times"]) <= 900.0
    model: Any = FoxForCausalLM.from_pretrained(out).eval()
    assert (model.config.sink_token_id, model.config.attention_sink) == (2, "learned")
    assert model.config.acp_rule == "measured" and model.config.max_position_embeddings == 1024
    bias = model.model.layers[1].self_attn.forget_gate.bias.double()
    times = report["by_head"]["decay_times"][1]
    np.testing.assert_allclose((-1 / torch.nn.functional.logsigmoid(bias)).tolist(), times, rtol=1e-5)
    ids = AutoTokenizer.from_pretrained(out)(text_file(folder).read_text(), add_special_tokens=False)["input_ids"]
    row = torch.tensor([[2, *ids[:511]]])
    for name, one in (("graft", model), ("base", graft(folder / "llama", forget_gate="none", rope_factor=2).eval())):
        with torch.no_grad():
            expected = one(row, labels=row).loss.item()
        assert abs(report["loss"]["by_row"][name][0] - expected) < 1e-4
    # Of the last 64 tokens, which the row has before.
    recall = report["recall"]
    asked = with_recall(torch.cat([row, row]), 0.125)[:1]
    assert recall["share"] == 0.125 and recall["tokens"] == 64
    with torch.no_grad():
        logits = model(asked).logits[0, -65:-1]
    assert abs(recall["by_row"]["graft"][0] - torch.nn.functional.cross_entropy(logits, asked[0, -64:]).item()) < 1e-4
    page = (out / "calibration.md").read_text()
    assert f"their last 64 tokens replaced by passages of them again, whose loss is: base {recall['base']:.4f}" in page
    assert page in result.output and f"{100 * report['loss']['over']:+.2f}%" in page
    assert (out / "calibration.svg").stat().st_size > 1000


def test_command_measures_texts_that_it_did_not_calibrate_on(folder: Path, tmp_path: Path) -> None:
    out, calibrated = tmp_path / "fox", tmp_path / "calibrated"
    # Folders in a folder are no part of it.
    (calibrated / "held out").mkdir(parents=True)
    text_file(calibrated)
    texts = [text_file(calibrated / "held out", 2500, seed=3), text_file(folder, 600, seed=4)]
    options = ["--held-out", str(texts[0].parent), "--held-out", str(texts[1])]
    result = invoke(folder, out, calibrated, "--skip", "0.2", "--separator", "<eos>", *options)
    assert result.exit_code == 0, result.output
    held_out = json.loads((out / "calibration.json").read_text())["held_out"]
    assert [x["text"] for x in held_out] == ["held out", texts[1].name]
    models: dict[str, Any] = {"base": LlamaForCausalLM.from_pretrained(folder / "llama").eval()}
    models["graft"] = FoxForCausalLM.from_pretrained(out).eval()
    for text, found, count in zip(texts, held_out, (4, 1), strict=True):
        ids = AutoTokenizer.from_pretrained(out)(text.read_text(), add_special_tokens=False)["input_ids"]
        # The separator, <eos>, is token 2.
        rows = [torch.tensor([[2, *ids[start : start + 511]]]) for start in range(0, 511 * count, 511)]
        for name, model in models.items():
            with torch.no_grad():
                expected = [model(row, labels=row).loss.item() for row in rows]
            np.testing.assert_allclose(found["by_row"][name], expected, atol=1e-4)
            assert abs(found[name] - np.mean(expected)) < 1e-4
        assert found["over"] == pytest.approx(found["graft"] / found["base"] - 1)
    low, high = held_out[0]["over_interval"]
    base_rows, graft_rows = (np.array(held_out[0]["by_row"][name]) for name in ("base", "graft"))
    drawn = np.random.default_rng(0).integers(4, size=(20_000, 4))
    expected = np.quantile(graft_rows[drawn].mean(1) / base_rows[drawn].mean(1) - 1, [0.025, 0.975])
    assert low < held_out[0]["over"] < high
    np.testing.assert_allclose([low, high], expected, atol=0.1 * (high - low))
    assert held_out[1]["over_interval"] is None
    page = (out / "calibration.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    first, second = (
        [x["text"], str(len(x["by_row"]["base"])), f"{x['base']:.4f}", f"{x['graft']:.4f}"] for x in held_out
    )
    assert page in result.output
    assert [*first, f"{100 * held_out[0]['over']:+.2f}% ({100 * low:+.2f} to {100 * high:+.2f})"] in lines
    assert [*second, f"{100 * held_out[1]['over']:+.2f}%"] in lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"w1 w2", "--held-out must be a text with rows of 511 tokens: "),
        ("bytes.txt", b"\xff\xfe\x00", "--held-out must be a text with rows of 511 tokens: "),
        ("missing.txt", None, "--held-out must be a file or a folder, "),
        ("calibrated.txt", None, "--held-out must be another text than that of the calibration, got "),
        (".", None, "--held-out must be another text than that of the calibration, got "),
        ("copy.txt", "calibrated.txt", "--held-out must be another text than that of the calibration, got "),
        ("tokens.npy", 97, "--held-out "),
    ],
    ids=["short", "not UTF-8", "missing", "the same", "a folder that holds it", "a copy", "no tokens of the model"],
)
def test_command_names_what_is_wrong_with_a_held_out_text(
    folder: Path, tmp_path: Path, name: str, content: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = tmp_path / "calibrated.txt"
    calibrated.write_bytes(text_file(folder).read_bytes())
    path = tmp_path / name
    if isinstance(content, int):
        np.save(path, np.full(600, content))
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else (tmp_path / content).read_bytes())
    monkeypatch.setattr("foxlm.conversion.calibrated_graft.calibrate", lambda *_, **__: pytest.fail("it ran"))
    result = invoke(folder, tmp_path / "fox", calibrated, "--held-out", str(path))
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(f"error: {message}"), result.stderr
    assert path.name in result.stderr and not (tmp_path / "fox").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--skip", "1"), "--skip must be a share between 0 and 1, got 1.0"),
        (("--skip", "nan"), "--skip must be a share between 0 and 1, got nan"),
        (("--longest", "2"), "--longest must be a decay time of at least 8 tokens, got 2.0"),
        (("--recall", "0.7"), "--recall must be a share of a row in [0, 0.5], got 0.7"),
        (("--rows", "0"), "--rows must be at least 1, got 0"),
        (("--length", "100"), "--length must be more than 256 tokens, got 100"),
        (("--separator", "<s>"), "--separator must be a token of the tokenizer, such as <eos>, got '<s>'"),
        (("--decay-times", "8"), "--calibrate sets decay times: leave out --decay-times"),
        (("--forget-gate", "none"), "calibration has no effect with forget_gate 'none'"),
        (("--skip", "0.9"), "--skip must be at most"),
    ],
)
def test_command_names_a_wrong_option(folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = invoke(folder, tmp_path / "fox", text_file(folder), *options)
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(f"error: {message}"), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no 511 tokens in a row, at most 0"),
        (b"w1 w2", "has no 511 tokens in a row, at most 2"),
        (b"\xff\xfe\x00", "must be UTF-8 text"),
        (None, "does not exist"),
    ],
    ids=["empty", "short", "not UTF-8", "missing"],
)
def test_command_names_what_is_wrong_with_a_text(
    folder: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    result = invoke(folder, tmp_path / "fox", text)
    assert result.exit_code == 1 and message in result.stderr and "text.txt" in result.stderr
    assert not (tmp_path / "fox").exists()


def test_command_needs_a_separator_and_a_text_for_its_options(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["graft", str(folder / "llama"), str(tmp_path / "fox"), "--skip", "0.2"])
    assert (result.exit_code, result.stderr) == (1, "error: --skip needs --calibrate TEXT\n")
    result = CliRunner().invoke(app, ["graft", str(folder / "llama"), str(tmp_path / "fox"), "--held-out", "x.txt"])
    assert (result.exit_code, result.stderr) == (1, "error: --held-out needs --calibrate TEXT\n")
    LlamaForCausalLM.from_pretrained(folder / "llama").save_pretrained(tmp_path / "llama")
    tokenizer = word_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    result = invoke(tmp_path, tmp_path / "fox", text_file(folder))
    assert result.exit_code == 1 and "give a separator" in result.stderr
