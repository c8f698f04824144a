"""``foxlm loss``: what it measures, keeps, refuses and draws."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from byte_models import byte_model
from foxlm.cli import app
from foxlm.evaluation import loss_report as module
from foxlm.evaluation.loss_report import LossOptions, bin_edges, measure_losses, summarize
from foxlm.evaluation.plots.position import plot_loss_by_position
from foxlm.evaluation.text import texts
from foxlm.modeling.attention_settings import attention_settings
from models import tiny_model
from oracles import counting_losses, save_counting


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["loss", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with known losses, bytes that count up, and text."""
    folder = tmp_path_factory.mktemp("loss")
    save_counting(folder / "slow")
    save_counting(folder / "fast", slope=0.02, max_position_embeddings=64)
    np.save(folder / "counted.npy", np.stack([(np.arange(128) + start) % 256 for start in range(5)]))
    (folder / "text.txt").write_text("".join(map(chr, range(32, 127))) * 8)
    return folder


def options(folder: Path, out: Path, *names: str, **fields: Any) -> LossOptions:
    models = [str(folder / name) for name in names]
    usual: dict[str, Any] = {"models": models, "text": folder / "counted.npy", "length": 128, "out": out}
    return LossOptions(**(usual | fields))


@pytest.mark.parametrize("chunk", [0, 50])
def test_bins_have_the_known_losses_of_their_positions(folder: Path, tmp_path: Path, chunk: int) -> None:
    report = measure_losses(options(folder, tmp_path, "slow", "fast", chunk=chunk, edges="1,2,64,100,128"))
    slow, fast = summarize(report)
    assert (slow["rows"], slow["trained_length"], fast["trained_length"]) == (5, 1024, 64)
    slow_losses, fast_losses = counting_losses(128), counting_losses(128, slope=0.02)
    for index, (start, end) in enumerate([(1, 2), (2, 64), (64, 100), (100, 128)]):
        expected = slow_losses[start - 1 : end - 1].mean().item()
        assert slow["loss"]["mean"][index] == pytest.approx(expected, rel=1e-6)
        difference = fast_losses[start - 1 : end - 1].mean().item() - expected
        # Each row is the same, and so is each draw of the bootstrap.
        for name in ("mean", "low", "high"):
            assert fast["difference"][name][index] == pytest.approx(difference, abs=1e-6)


def test_an_interrupted_run_goes_on_at_the_next_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    row_losses = module.row_losses

    def counted(model, rows, chunk):
        for index, row in enumerate(row_losses(model, rows, chunk)):
            measured.append(model.config.slope)
            yield row
            if len(measured) == 8 and index == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "row_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_losses(options(folder, tmp_path, "slow", "fast"))
    kept = json.loads((tmp_path / "loss.json").read_text())
    assert [len(model["row_means"]) for model in kept["models"]] == [5, 3]
    report = measure_losses(options(folder, tmp_path, "slow", "fast"))
    assert measured == 5 * [0.01] + 5 * [0.02]
    assert [len(model["row_means"]) for model in report["models"]] == [5, 5]
    # Nothing is left to do, and no model is loaded for that; overwriting begins anew.
    monkeypatch.setattr(module, "load_model", None)
    assert measure_losses(options(folder, tmp_path, "slow", "fast"))["models"] == report["models"]
    with pytest.raises(TypeError):
        measure_losses(options(folder, tmp_path, "slow", overwrite=True))


def test_other_settings_and_other_weights_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder / "slow", tmp_path / "models" / "slow").parent
    shutil.copy(folder / "counted.npy", source)
    out = tmp_path / "out"
    measure_losses(options(source, out, "slow", rows=2))
    for change, message in (
        ({"length": 64}, "results with length 128, now it is 64"),
        ({"rows": 3}, "results with rows 2, now it is 3"),
        ({"edges": "32"}, "results with edges"),
        ({"dtype": "bfloat16"}, "model slow, has results with dtype 'auto', now it is 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_losses(options(source, out, "slow", **({"rows": 2} | change)))
    save_counting(source / "slow", slope=0.0100001)
    with pytest.raises(ValueError, match="model slow, has results with fingerprint"):
        measure_losses(options(source, out, "slow", rows=2))


def test_models_measured_before_stay(folder: Path, tmp_path: Path) -> None:
    measure_losses(options(folder, tmp_path, "slow", rows=2))
    report = measure_losses(options(folder, tmp_path, "fast", rows=2))
    assert [model["name"] for model in report["models"]] == ["fast", "slow"]


def test_losses_that_are_not_finite_are_named_and_not_averaged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_counting(tmp_path / "broken", nan_from=100)
    shutil.copytree(folder / "slow", tmp_path / "slow")
    shutil.copy(folder / "counted.npy", tmp_path)
    report = measure_losses(options(tmp_path, tmp_path / "out", "slow", "broken", rows=2))
    assert "the loss of broken is nan in row 0 at position 100" in capsys.readouterr().err
    slow, broken = summarize(report)
    assert broken["not_finite"] == {"row": 0, "position": 100, "loss": "nan"} and slow["not_finite"] is None
    edges = report["settings"]["edges"]
    for start, end, mean, difference in zip(
        edges, edges[1:], broken["loss"]["mean"], broken["difference"]["mean"], strict=False
    ):
        assert (mean is None) == (difference is None) == (end > 100), (start, end)
    shown = module.loss_table(report)
    assert "not finite" in shown and "broken: loss is nan in row 0 at position 100, the first such" in shown
    plot_loss_by_position(report)


def test_a_single_row_has_no_interval(folder: Path, tmp_path: Path) -> None:
    (one,) = summarize(measure_losses(options(folder, tmp_path, "slow", rows=1)))
    assert all(math.isfinite(mean) for mean in one["loss"]["mean"]) and set(one["loss"]["low"]) == {None}


def test_different_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "fast", tmp_path / "fast")
    tokenizer = json.loads((tmp_path / "fast" / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (tmp_path / "fast" / "tokenizer.json").write_text(json.dumps(tokenizer))
    models = [str(folder / "slow"), str(tmp_path / "fast")]
    with pytest.raises(ValueError, match=r"must have the same tokenizer, .* slow and fast make"):
        measure_losses(options(folder, tmp_path / "out", models=models, text=folder / "text.txt"))
    assert not (tmp_path / "out").exists()
    # Token numbers are what they are.
    measure_losses(options(folder, tmp_path / "out", models=models, rows=1))


def test_edges() -> None:
    assert bin_edges("log", 16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert bin_edges("log", 17) == [1, 2, 3, 4, 6, 8, 12, 17]
    assert bin_edges("log", 2) == [1, 2]
    assert bin_edges("10", 32) == [1, 11, 21, 31, 32]
    assert bin_edges("1,5,9", 10) == [1, 5, 9]
    for bad in ("", "x", "0", "10", "5,1", "0,5", "1,11", "3,3"):
        with pytest.raises(ValueError, match="edges must be log"):
            bin_edges(bad, 10)


def test_the_command_measures_draws_and_draws_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (folder / "slow", folder / "fast", "--text", folder / "counted.npy", "--length", 128, "--out", out)
    result = invoke(*arguments, "--rows", 9, "--name", "one", "--name", "two")
    assert result.exit_code == 0, result.output
    assert "over 5 rows (9 were wanted" in result.output and "one" in result.output
    names = {"loss.json", "loss.svg", "loss.png"}
    assert {path.name for path in out.iterdir()} == names
    content = json.loads((out / "loss.json").read_text())
    assert content["models"][0]["provenance"]["torch"] == torch.__version__
    first = (out / "loss.svg").read_bytes()
    (out / "loss.svg").unlink()
    assert invoke("--redraw", out).exit_code == 0
    assert (out / "loss.svg").read_bytes() == first
    # Where matplotlib is not installed, results are kept all the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foxlm.cli.evaluate.find_spec", lambda name: None)
        result = invoke("--redraw", out / "loss.json")
    assert result.exit_code == 0 and f"foxlm loss --redraw {out / 'loss.json'}" in result.output


def test_a_fox_model_of_real_text(tmp_path: Path, folder: Path) -> None:
    model = byte_model(max_position_embeddings=64)
    model.save_pretrained(tmp_path / "fox")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "slow" / name, tmp_path / "fox")
    out = ("--text", folder / "text.txt", "--length", 96, "--rows", 2, "--edges", "1,96")
    result = invoke(tmp_path / "fox", *out, "--out", tmp_path / "out", "--eps", "0")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "loss.json").read_text())
    rows = torch.tensor([list((folder / "text.txt").read_bytes()[start : start + 96]) for start in (0, 96)])
    model.config.acp_eps = None
    expected = [model(row[None], labels=row[None]).loss.item() for row in rows]
    assert [row[0] for row in content["models"][0]["row_means"]] == pytest.approx(expected, rel=1e-5)
    assert content["models"][0]["pruning"] == {
        "eps": None,
        "rule": None,
        "attention": False,
        "least_pairs": None,
        "generation": False,
    }


@pytest.mark.parametrize(("asked", "least"), [({}, 1 << 28), ({"eps": "0.01"}, 0), ({"rule": "paper"}, 0)])
def test_short_rows_are_pruned_where_pruning_is_asked_for(
    folder: Path, tmp_path: Path, asked: dict[str, Any], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself a model leaves them whole: with and without --eps would be the same numbers, and recorded as pruned."""
    tiny_model("pro", dtype=torch.float32, vocab_size=256).save_pretrained(tmp_path / "fox")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "slow" / name, tmp_path / "fox")
    found = []

    def row_losses(model: Any, rows: Any, chunk: int | None) -> Any:
        found.append(attention_settings(model.config, learns=False))
        return iter(torch.zeros(1, 63))

    monkeypatch.setattr("foxlm.evaluation.loss_report.row_losses", row_losses)
    # As on a GPU, and outside of tests, which prune what is short.
    monkeypatch.setattr("foxlm.evaluation.loading.PYTORCH", None)
    monkeypatch.setattr("foxlm.modeling.attention_settings._least_pairs", 1 << 28)
    options = LossOptions(
        models=[str(tmp_path / "fox")], text=folder / "text.txt", length=64, out=tmp_path / "out", rows=1
    )
    report = measure_losses(replace(options, **asked))
    assert found[0].least_pairs == report["models"][0]["pruning"]["least_pairs"] == least
    assert report["models"][0]["pruning"]["rule"] == asked.get("rule", "tight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{slow}", "--text", "{text}", "--length", "64", "--rule", "measured"],
            "rule must be paper, tight or model, got 'measured', which is for training",
        ),
        ([], "models to measure, --text and --length must be given, or --redraw"),
        (["{slow}", "--length", "64"], "models to measure, --text and --length must be given"),
        (["{slow}", "--text", "{text}", "--length", "1"], "length must be from 2 to 134,217,728, got 1"),
        (["{slow}", "--text", "{text}", "--length", "9999"], "has no 9999 tokens in a row, at most 760"),
        (["{slow}", "--text", "nowhere.txt", "--length", "64"], "nowhere.txt"),
        (["nowhere", "--text", "{text}", "--length", "64"], "nowhere"),
        (
            ["{slow}", "{slow}", "--text", "{text}", "--length", "64"],
            "models must have different names, got slow, slow",
        ),
        (["{slow}", "--text", "{text}", "--length", "64", "--name", "a", "--name", "b"], "name must be given once"),
        (["{slow}", "--text", "{text}", "--length", "64", "--rows", "0"], "rows must be at least 1, got 0"),
        (["{slow}", "--text", "{text}", "--length", "64", "--chunk", "-1"], "chunk must be at least 0"),
        (["{slow}", "--text", "{text}", "--length", "64", "--dtype", "int8"], "dtype must be auto or one of"),
        (["{slow}", "--text", "{text}", "--length", "64", "--device", "tpu"], "device must be auto, cpu"),
        (["{slow}", "--text", "{text}", "--length", "64", "--eps", "0.1"], "eps and rule are of FoX models"),
        (["{slow}", "--text", "{text}", "--length", "64", "--trained-length", "0"], "--trained-length must be"),
        (["{slow}", "--save-losses"], "--save-losses was removed; foxlm.evaluation.loss_by_position.row_losses"),
        (["--redraw", "{text}"], "is not JSON"),
        (["--redraw", "nowhere.json"], "nowhere.json"),
        (["{slow}", "--redraw", "{text}"], "--redraw measures nothing"),
        (["--redraw", "{text}", "--rows", "3"], "--redraw measures nothing: leave out --rows"),
    ],
)
def test_what_is_refused_in_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"slow": folder / "slow", "text": folder / "text.txt"}
    out = [] if "--redraw" in arguments else ["--out", tmp_path / "out"]
    result = invoke(*(argument.format(**places) for argument in arguments), *out)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert not (tmp_path / "out" / "loss.json").exists()


def test_a_file_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = invoke(folder / "slow", "--text", folder / "text.txt", "--length", 64, "--out", tmp_path / "file")
    assert result.exit_code == 1 and "--out must be a folder, got the file" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_names_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a --name for each, not empty"):
        measure_losses(options(folder, tmp_path, "slow", names=("",)))


@pytest.mark.parametrize(
    "content",
    [
        {"settings": {}, "models": []},
        {"settings": {"edges": [1, 2]}, "models": [{}]},
        {"settings": 5, "models": []},
    ],
)
def test_damaged_results_are_named_and_not_drawn(folder: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    results = tmp_path / "loss.json"
    results.write_text(json.dumps({"kind": "loss", "text": "x", "rows_wanted": 1} | content))
    done = invoke("--redraw", results)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.startswith(f"error: {results} is damaged"), done.stderr


def test_files_that_are_no_text_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.npy").touch()
    (tmp_path / "broken.npy").write_text("hello")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800 abc"}\n')
    (tmp_path / "many.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "large.npy", np.full(300, 2**64 - 1, dtype=np.uint64))
    for name in ("empty.npy", "broken.npy", "half.jsonl", "many.jsonl", "objects.npy", "large.npy"):
        done = invoke(folder / "slow", "--text", tmp_path / name, "--length", 128, "--out", tmp_path / "out")
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
        assert done.stderr.startswith(f"error: {tmp_path / name}"), done.stderr


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert list(texts(tmp_path)) == ["one", "two", "three"]
