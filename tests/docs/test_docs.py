"""What the README and the pages in docs/ show runs as shown, and their links lead somewhere."""

import doctest
import functools
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import foxlm
from foxlm import FoxConfig, FoxForCausalLM
from foxlm.cli import app
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.modeling.remote_code import exported_files

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Not run here: what installs, takes checkpoints that are not there, or minutes.
NOT_RUN: tuple[str, ...] = ("make ", "pip install", "python examples/")
NOT_RUN += tuple(f"foxlm {name}" for name in ("publish", "convert", "graft", "card", "bench", "eval"))


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


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for index, snippet in enumerate(snippets(page, "python")):
        if ">>>" in snippet:
            continue
        # A page goes on where its last snippet ended; the README's stand alone.
        scope = {"__name__": "page"} if page.parent == ROOT else names
        exec(compile(snippet, f"{page.name} snippet {index}", "exec"), scope)


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


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the commands are run: a small model, a text to measure on."""
    path = tmp_path
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = FoxConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        decay_time_max=64.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    FoxForCausalLM(config).save_pretrained(path / "my-fox")
    tokenizer.save_pretrained(path / "my-fox")
    (path / "book.txt").write_text(text_of(ROOT / "docs" / "design" / "pruning.md")[:6000], encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for line in commands(page):
        if not line.startswith(NOT_RUN):
            program, *arguments = shlex.split(line)
            assert program == "foxlm", line
            done = CliRunner().invoke(app, arguments)
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
