"""What the README and the pages in docs/ show runs as shown, page by page, and their links lead somewhere."""

import doctest
import functools
import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import foxlm
from authors_checkpoints import authors_checkpoint
from base_models import base
from byte_models import byte_model
from checkpoints import write
from foxlm import FoxConfig, FoxForCausalLM
from foxlm.cli import app
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.modeling.remote_code import exported_files

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Not run here: what installs, uploads, takes checkpoints that are not there, or minutes.
NOT_RUN = ("make ", "pip install", "python examples/", "foxlm bench", "foxlm graft HuggingFaceTB/")
# Ten questions of each task, or four needles of each kind, take minutes.
SHORTER = {"eval": ["--limit", "1"], "needle": ["--samples", "1"]}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of shell, without comments, continued lines joined."""
    text = "\n".join(snippets(page, "sh")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_pages_have_snippets():
    assert sum(len(snippets(page, "python")) for page in PAGES) >= 10
    assert any(line.startswith("foxlm report") for page in PAGES for line in commands(page))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_that_are_named_exist(page):
    if page.name in ("tuning.md", "CHANGELOG.md"):
        return  # what they name may be gone
    for path in re.findall(
        r"`((?:foxlm|kernels|modeling|conversion|evaluation|tests|examples|docs)/[\w./-]*)`", text_of(page)
    ):
        assert (ROOT / path).exists(), path


def test_readme_is_short_and_narrow():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 200


def python_of(page: Path) -> None:
    """Run the snippets of a page in the current folder."""
    names: dict[str, object] = {"__name__": "page"}
    for index, snippet in enumerate(snippets(page, "python")):
        if ">>>" in snippet:
            continue
        # A page goes on where its last snippet ended; the README's stand alone.
        scope = {"__name__": "page"} if page.parent == ROOT else names
        exec(compile(snippet, f"{page.name} snippet {index}", "exec"), scope)


def supply_what_a_reader_has(folder: Path) -> None:
    """Sources to convert and graft, a text, earlier scores, and a model on pages that make none themselves."""
    fields, _, weights = authors_checkpoint("pro")
    write(folder / "source-model", fields, weights)
    base("llama").save_pretrained(folder / "my-llama")
    text = text_of(ROOT / "docs" / "design" / "pruning.md")[:6000]
    (folder / "book.txt").write_text(text, encoding="utf-8")
    (folder / "results").mkdir()
    (folder / "results" / "results_scores.json").write_text('{"piqa": {"acc": 0.5}}')
    # Not in place of a page's own: what it makes is what its commands are to work on.
    if not (folder / "my-fox").exists():
        byte_model(max_position_embeddings=512).save_pretrained(folder / "my-fox")
        byte_tokenizer().save_pretrained(folder / "my-fox")


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's index of RULER's tasks alone: to index all that it has takes seconds."""
    lm_tasks = pytest.importorskip("lm_eval.tasks")
    ruler = Path(lm_tasks.__file__).parent / "ruler"
    whole = lm_tasks.TaskManager

    def only_ruler(include_path: Sequence[str] = (), metadata: Any = None) -> Any:
        return whole(include_path=[str(ruler), *include_path], include_defaults=False, metadata=metadata)

    monkeypatch.setattr(lm_tasks, "TaskManager", only_ruler)


@pytest.mark.slow
@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_page_runs(page, tmp_path, monkeypatch):
    """Its Python, then its commands in the folder that this leaves, as a reader has them."""
    monkeypatch.chdir(tmp_path)
    python_of(page)
    lines = [line for line in commands(page) if not line.startswith(NOT_RUN) and "--push" not in line]
    if lines:
        supply_what_a_reader_has(tmp_path)
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "foxlm", line
        done = CliRunner().invoke(app, arguments + SHORTER.get(arguments[0], []))
        assert done.exit_code == 0, (line, done.output[-2000:], done.exception)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_the_options_that_are_shown(page):
    """Also of those that are not run."""
    for line in commands(page):
        if line.startswith("foxlm "):
            words = shlex.split(line)[1:]
            name = words[:2] if words[0] == "bench" else words[:1]
            shown = help_of(*name)
            for option in (word.split("=")[0] for word in words if word.startswith("--")):
                assert option in shown, line


@functools.cache
def help_of(*name: str) -> str:
    done = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "400"})
    assert done.exit_code == 0, (name, done.output)
    return done.output


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_that_are_named_exist(page):
    for name, bench in re.findall(r"`foxlm ([a-z-]+)(?: ([a-z]+))?", text_of(page)):
        if name == "bench" and bench:
            help_of(name, bench)
        elif name != "lm-eval":  # whose help is lm-evaluation-harness's
            help_of(name)


def test_files_of_the_export_are_listed():
    table = text_of(ROOT / "docs" / "design" / "exporter.md").partition("| holds | files |")[2].partition("\n\n")[0]
    listed = re.findall(r"`(\w+\.py)`", table)
    assert set(listed) == exported_files().keys() and len(listed) == len(set(listed))


def test_api_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run: python docs/make_api.py"


def test_changelog_dates_the_version():
    releases = re.findall(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", text_of(ROOT / "CHANGELOG.md"), flags=re.MULTILINE)
    assert releases[0] == foxlm.__version__


def test_results_are_json():
    for file in (ROOT / "docs" / "results").rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


def test_examples_of_the_api_reference_run():
    """The prompts in docstrings, with the names that their readers have imported."""
    from foxlm.conversion.balance_heads import balance_heads
    from foxlm.evaluation.gates import decay_times
    from foxlm.evaluation.recording import record_attention

    names = {name: getattr(foxlm, name) for name in foxlm.__all__} | {"torch": torch, "decay_times": decay_times}
    names |= {"balance_heads": balance_heads, "DynamicCache": DynamicCache}
    names |= {"record_attention": record_attention, "input_ids": torch.tensor([[1, 2, 3]])}
    names["model"] = FoxForCausalLM(FoxConfig(vocab_size=8, hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for snippet in snippets(ROOT / "docs" / "api.md", "python"):
        test = parser.get_doctest(snippet, dict(names), "api.md", None, 0)
        assert runner.run(test, out=lambda text: None).failed == 0, snippet
