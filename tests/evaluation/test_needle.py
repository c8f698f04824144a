"""``foxlm needle``: models that are known to find needles, or only near ones, or none."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from byte_models import byte_model
from foxlm.cli import app
from foxlm.cli.evaluate import parse_numbers
from foxlm.evaluation import needle as module
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.evaluation.loading import load_model
from foxlm.evaluation.needle import NeedleOptions, answer_scores, contains, measure_needle, word_recall
from foxlm.evaluation.needle_prompts import (
    PromptMaker,
    draw_needle,
    haystack_tokens,
    synthetic_text,
)
from models import tiny_model, tokens
from oracles import save_recalling

LENGTHS, DEPTHS = (800, 1400), (0.0, 0.5, 1.0)


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["needle", *map(str, arguments)])


@pytest.fixture(scope="module")
def recalling(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_recalling(tmp_path_factory.mktemp("needle") / "recalling")


def options(model: str, out: Path, **fields: Any) -> NeedleOptions:
    usual: dict[str, Any] = {"model": model, "out": out, "lengths": LENGTHS, "depths": DEPTHS, "samples": 2}
    return NeedleOptions(**(usual | fields))


def found(report: dict) -> dict:
    return {(cell["length"], cell["depth"]): cell["found"] for cell in report["cells"]}


def maker(mode: str = "easy", seed: int = 0) -> PromptMaker:
    tokenizer = byte_tokenizer()
    if mode == "chat":
        tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<bot> "
    return PromptMaker(tokenizer, mode, haystack_tokens(None, tokenizer, 70_000, seed)[0], seed)


@pytest.mark.parametrize("mode", ["easy", "standard"])
@pytest.mark.parametrize("chunk", [0, 300])
def test_a_model_that_recalls_finds_every_needle(recalling: str, tmp_path: Path, mode: str, chunk: int) -> None:
    report = measure_needle(options(recalling, tmp_path, mode=mode, chunk=chunk))
    assert found(report) == {(length, depth): 1.0 for length in LENGTHS for depth in DEPTHS}
    for cell in report["cells"]:
        assert cell["accuracy"] == cell["recall"] == 1.0 and cell["loss"] < 1e-3
    assert "100.0%" in module.needle_table(report)


@pytest.mark.parametrize("score_only", [False, True])
def test_a_model_that_sees_600_tokens_finds_needles_that_near(tmp_path: Path, score_only: bool) -> None:
    near = save_recalling(tmp_path / "near", window=600)
    report = measure_needle(options(near, tmp_path / "out", score_only=score_only))
    # Behind the middle of 800 tokens stand fewer than 600, needle and question included; behind that of 1,400 more.
    assert found(report) == {
        (800, 0.0): 0.0,
        (800, 0.5): 1.0,
        (800, 1.0): 1.0,
        (1400, 0.0): 0.0,
        (1400, 0.5): 0.0,
        (1400, 1.0): 1.0,
    }
    missed = report["cells"][0]["samples"][0]
    assert missed["loss"] > 5 and missed["accuracy"] < 0.5
    assert missed["written"] is None if score_only else missed["recall"] == 0


def test_a_model_of_random_weights_finds_none(tmp_path: Path) -> None:
    byte_model(max_position_embeddings=1024).save_pretrained(tmp_path / "random")
    byte_tokenizer().save_pretrained(tmp_path / "random")
    fields: dict[str, Any] = {"lengths": (480,), "depths": (0.5,), "samples": 2, "answer_tokens": 3, "mode": "standard"}
    for name, chunk in (("whole", 0), ("parts", 300)):
        report = measure_needle(options(str(tmp_path / "random"), tmp_path / name, chunk=chunk, **fields))
        assert found(report) == {(480, 0.5): 0.0}
        assert all(sample["recall"] == 0 and sample["loss"] > 3 for sample in report["cells"][0]["samples"])


def test_chat_asks_by_the_template(tmp_path: Path) -> None:
    # What follows "assistant] " before is nothing: it cannot begin to answer, but its loss is measured.
    talking = save_recalling(tmp_path / "chat", chat=True)
    fields: dict[str, Any] = {"lengths": (700,), "depths": (0.5,), "mode": "chat", "samples": 1}
    report = measure_needle(options(talking, tmp_path / "out", **fields))
    (sample,) = report["cells"][0]["samples"]
    assert not sample["found"] and 0.5 < sample["accuracy"] < 1
    prompt = byte_tokenizer().decode(maker("chat").prompt(0, 600, 0.5)[0])
    assert prompt.startswith("<user> ") and prompt.endswith("the best thing to do in San Francisco?\n<bot> ")
    result = invoke(save_recalling(tmp_path / "base"), "--mode", "chat", "--out", tmp_path / "no")
    assert result.exit_code == 1 and "mode chat needs a tokenizer with a chat template" in result.stderr


@pytest.mark.parametrize("mode", ["easy", "standard", "chat"])
def test_prompts_have_their_length_and_the_needle_its_depth(mode: str) -> None:
    made = maker(mode)
    for sample in (0, 1, 5):
        needle = draw_needle(0, sample)
        for depth in (0.0, 0.2, 0.5, 1.0):
            prompt, follows = made.prompt(sample, 3000, depth)
            text = byte_tokenizer().decode(prompt)
            hidden = (
                f"\n{needle.question} Answer: {needle.statement}\n" if mode == "easy" else f"\n{needle.statement}\n"
            )
            assert len(prompt) == 3000 and text.count(hidden) == 1
            before, after = text.split(hidden)
            hay = len(text) - len(hidden) - (len(after) - after.index("\n\nThere is an important"))
            assert depth * hay - 120 <= len(before) <= depth * hay + 10
            assert depth in (0.0, 1.0) or before.endswith((".", "\n"))
            answer = byte_tokenizer().decode(follows)
            assert answer == (needle.statement if mode == "chat" else f" {needle.answer}.")
    least = made.least(3)
    assert len(made.prompt(2, least, 0.5)[0]) == least


def test_needles_differ_and_repeat_with_the_seed() -> None:
    assert draw_needle(7, 0).statement == (
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    )
    drawn = {draw_needle(0, sample).answer for sample in range(50)}
    assert len(drawn) > 45 and draw_needle(0, 3) == draw_needle(0, 3) != draw_needle(1, 3)
    # No needle can be answered by the haystack.
    hay = synthetic_text("0", 3000)
    assert not any(f"in {city}" in hay for city in ("San Francisco", "Lisbon", "Rome"))


def test_haystacks_of_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("A line.\n" * 100)
    hay, repeats = haystack_tokens(path, byte_tokenizer(), 1000, 0)
    assert len(hay) >= 1000 and repeats == 800 and np.array_equal(hay[:800], hay[800:1600])
    assert haystack_tokens(path, byte_tokenizer(), 300, 0)[1] == 0
    path.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        haystack_tokens(path, byte_tokenizer(), 300, 0)


def test_scores_are_the_models_own_losses() -> None:
    model, prompts = tiny_model("pro"), tokens(3, 20)
    answers = [tokens(size, seed=size) for size in (1, 4, 6)]
    for chunk in (0, 7, 19):
        for prompt, answer, (loss, accuracy) in zip(
            prompts, answers, answer_scores(model, prompts, answers, chunk), strict=True
        ):
            row = torch.cat([prompt, answer])[None]
            labels = row.clone()
            labels[:, :20] = -100
            out = model(row, labels=labels)
            assert loss == pytest.approx(out.loss.item(), rel=1e-5)
            assert accuracy == (out.logits[0, 19:-1].argmax(-1) == answer).double().mean()


def test_what_counts_as_found() -> None:
    assert contains("Well: Eat a  sandwich, please.", "eat a sandwich")
    assert not contains("eat a sandwiches", "eat a sandwich") and not contains("a sandwich eat", "eat a sandwich")
    assert word_recall("a park and a day", "sit in a park on a day") == 4 / 7
    assert word_recall("", "one") == 0 and word_recall("one one", "one") == 1


def test_what_is_written_is_what_generate_writes(tmp_path: Path) -> None:
    near = load_model(save_recalling(tmp_path / "near", window=120))
    prompt = maker().prompt(1, 700, 0.0)
    (scored,) = module.ask(near, byte_tokenizer(), [prompt], ["nothing"], 9)
    ids = torch.from_numpy(prompt[0])[None]
    assert scored["written"] == byte_tokenizer().decode(near.generate(ids, max_new_tokens=9, do_sample=False)[0, 700:])
    assert scored["written"] and not scored["found"]


def test_an_interrupted_run_goes_on_with_the_next_cell(
    recalling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | str] = []
    ask = module.ask

    def counted(model, tokenizer, prompts, *args):
        if len(asked) == 3:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.append(len(prompts[0][0]))
        return ask(model, tokenizer, prompts, *args)

    monkeypatch.setattr(module, "ask", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_needle(options(recalling, tmp_path, score_only=True))
    assert len(json.loads((tmp_path / "needle.json").read_text())["cells"]) == 3
    report = measure_needle(options(recalling, tmp_path, score_only=True))
    assert len(report["cells"]) == 6 and len(asked) == 7
    # More of the grid is added to it, and a whole one needs no model.
    report = measure_needle(options(recalling, tmp_path, score_only=True, lengths=(800, 900)))
    assert len(report["cells"]) == 9 and len(asked) == 10
    monkeypatch.setattr(module, "load_model", None)
    assert measure_needle(options(recalling, tmp_path, score_only=True))["cells"] == report["cells"]
    for change in ({"samples": 3}, {"seed": 1}, {"mode": "standard"}, {"dtype": "float32"}, {"score_only": False}):
        (name,) = change
        with pytest.raises(ValueError, match=f"has results with {name}"):
            measure_needle(options(recalling, tmp_path, **({"score_only": True} | change)))


def test_the_command_measures_draws_and_draws_again(recalling: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(recalling, "--lengths", "2000,900", "--depths", "0,1", "--samples", "1", "--out", out)
    assert result.exit_code == 0, result.output
    assert "needles found: 100.0%" in result.output and "2,000" in result.output
    assert {path.name for path in out.iterdir()} == {"needle.json", "needle.svg", "needle.png"}
    content = json.loads((out / "needle.json").read_text())
    assert content["trained_length"] == 1024 and content["provenance"]["torch"] == torch.__version__
    first = (out / "needle.svg").read_bytes()
    (out / "needle.svg").unlink()
    assert invoke("--redraw", out / "needle.json").exit_code == 0
    assert (out / "needle.svg").read_bytes() == first
    # Without lengths: from an eighth of what it is made for to twice that, as far as a question fits.
    result = invoke(recalling, "--depths", "1", "--samples", "1", "--score-only", "--out", tmp_path / "default")
    assert result.exit_code == 0, result.output
    cells = json.loads((tmp_path / "default" / "needle.json").read_text())["cells"]
    assert [cell["length"] for cell in cells] == [512, 1024, 2048]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model to measure must be given, or --redraw"),
        (["nowhere"], "nowhere is no model's folder"),
        (["{model}", "--lengths", "64"], "lengths must be at least"),
        (["{model}", "--lengths", "0"], "lengths must be positive, got [0]"),
        (["{model}", "--lengths", "many"], "lengths must be numbers with commas between them, got 'many'"),
        (["{model}", "--depths", "0,2"], "depths must be shares from 0"),
        (["{model}", "--depths", "nan"], "depths must be shares from 0"),
        (["{model}", "--samples", "0"], "samples must be at least 1, got 0"),
        (["{model}", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["{model}", "--chunk", "-1"], "chunk must be at least 0, got -1"),
        (["{model}", "--mode", "hard"], "mode must be one of easy, standard, chat, got 'hard'"),
        (["{model}", "--text", "nowhere.txt"], "nowhere.txt"),
        (["{model}", "--eps", "0"], "eps and rule are of FoX models"),
        (["{model}", "--answer-tokens", "0"], "--answer-tokens must be at least 1"),
        (["--redraw", "nowhere.json"], "nowhere.json"),
        (["--redraw", "{model}/config.json"], "holds no results of foxlm needle"),
        (["{model}", "--redraw", "x.json"], "--redraw measures nothing"),
        (["--redraw", "x.json", "--samples", "4"], "--redraw measures nothing: leave out --samples"),
    ],
)
def test_what_is_refused_in_one_line(recalling: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = [] if "--redraw" in arguments else ["--out", tmp_path / "out"]
    result = invoke(*(argument.format(model=recalling) for argument in arguments), *out)
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_is_refused(recalling: str, tmp_path: Path) -> None:
    shutil.copytree(recalling, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    result = invoke(tmp_path / "bare", "--out", tmp_path / "out")
    assert result.exit_code == 1 and f"{tmp_path / 'bare'} has no tokenizer" in result.stderr


def test_numbers() -> None:
    assert parse_numbers("x", "3,1,3", int) == [1, 3]
    for bad in ("", "1,", "1.5"):
        with pytest.raises(ValueError, match="x must be numbers"):
            parse_numbers("x", bad, int)


def test_a_file_in_place_of_the_folder_is_refused(recalling: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = invoke(recalling, "--out", tmp_path / "file")
    assert result.exit_code == 1 and "--out must be a folder, got the file" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_haystack_of_tokens_that_the_model_has_not_is_refused(recalling: str, tmp_path: Path) -> None:
    for token in (-1, 99_999):
        np.save(tmp_path / "tokens.npy", np.full(3000, token))
        done = invoke(recalling, "--text", tmp_path / "tokens.npy", "--lengths", 800, "--out", tmp_path / "out")
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
        assert "must hold tokens in [0, " in done.stderr and f"got {token} to {token}" in done.stderr


def test_damaged_results_are_named_and_not_drawn(recalling: str, tmp_path: Path) -> None:
    results = tmp_path / "needle.json"
    content = {"kind": "needle", "name": "x", "trained_length": 3}
    damages: list[dict[str, object]] = [
        {"settings": {}, "cells": []},
        {"settings": {}, "cells": [{}]},
        {"settings": 5, "cells": 7},
    ]
    for damaged in damages:
        results.write_text(json.dumps(content | damaged))
        done = invoke("--redraw", results)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
        assert done.stderr.startswith(f"error: {results} is damaged"), done.stderr
