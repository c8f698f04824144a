"""The package: what importing it does, and the rules that let a checkout, an install and a bundle work alike."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

import foxlm

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "modeling", "conversion", "evaluation")


def run(code: str, folder: Path, **environment: str) -> str:
    """Output of a fresh interpreter started in ``folder``, which ``python -c`` puts on the path."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_folders_at_the_root_are_no_packages() -> None:
    """transformers takes an importable `kernels` for the package of that name, whenever the root is on the path."""
    found = [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]
    assert not found, f"{found} must not have an __init__.py"
    assert (ROOT / "foxlm/__init__.py").is_file()


def test_each_file_is_loaded_under_one_name() -> None:
    code = """
import collections, json, pathlib, sys
import transformers, foxlm
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_config(foxlm.FoxConfig.preset("pro-125m", num_hidden_layers=1, vocab_size=97))
names = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    if getattr(module, "__file__", None) and pathlib.Path(module.__file__).is_absolute():
        names[str(pathlib.Path(module.__file__).resolve())].append(name)
print(json.dumps(names))
"""
    names = json.loads(run(code, ROOT))
    ours = {path: found for path, found in names.items() if ROOT in Path(path).parents and ".venv" not in path}
    assert len(ours) >= 8, ours
    for path, found in ours.items():
        assert len(found) == 1 and found[0].split(".")[0] == "foxlm", f"{path} is loaded as {found}"


def test_import_needs_nothing_optional(tmp_path: Path) -> None:
    """transformers' own models may import some of these; from there on they cannot be imported."""
    optional = ["triton", "peft", "lm_eval", "matplotlib", "datasets", "wonderwords", "typer", "scipy", "pandas"]
    code = f"""
import sys
from transformers import LlamaForCausalLM, LlamaForQuestionAnswering, LlamaForTokenClassification, Trainer
sys.modules.update(dict.fromkeys({optional}))
import foxlm
print([name for name in {optional} if sys.modules[name] is not None])
"""
    assert run(code, tmp_path).strip() == "[]"


def test_import_does_not_import_peft(tmp_path: Path) -> None:
    code = "import sys, foxlm; print([n for n in ('peft', 'lm_eval', 'matplotlib', 'datasets') if n in sys.modules])"
    assert run(code, tmp_path).strip() == "[]"


def test_import_loads_what_registering_needs_and_no_more(tmp_path: Path) -> None:
    """Beside what any model of transformers loads, our own modules; no kernels, operators or context parallelism."""
    code = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
before = set(sys.modules)
import foxlm
new = set(sys.modules) - before
print(*sorted(name for name in new if name.partition(".")[0] != "foxlm"))
print(*sorted(name for name in new if name.startswith("foxlm.kernels")))
import torch
print([name for name in dir(torch.ops.foxlm_kernels) if not name.startswith("_")])
"""
    others, kernels, operators = run(code, tmp_path).split("\n")[:3]
    assert not others.split()
    heavy = ("attention", "backends", "triton", "reference", "portable", "hopper", "context_parallel", "pruning.search")
    assert not [name for name in kernels.split() if name.removeprefix("foxlm.kernels.").startswith(heavy)]
    assert operators == "['name']"


@pytest.mark.parametrize("first", ["transformers", "foxlm"])
def test_transformers_works_from_the_root(first: str) -> None:
    code = f"""
import {first}
import transformers, foxlm
from transformers import AutoModelForCausalLM, LlamaConfig
tiny = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
print(type(AutoModelForCausalLM.from_config(LlamaConfig(**tiny))).__name__)
print(type(AutoModelForCausalLM.from_config(foxlm.FoxConfig(**tiny))).__name__)
"""
    assert run(code, ROOT).split() == ["LlamaForCausalLM", "FoxForCausalLM"]


def test_import_registers_fox_with_transformers(tmp_path: Path) -> None:
    code = """
from transformers import AutoConfig
try:
    AutoConfig.for_model("fox")
except ValueError:
    import foxlm
    print(type(AutoConfig.for_model("fox")).__name__)
"""
    assert run(code, tmp_path).strip() == "FoxConfig"
    assert MODEL_FOR_CAUSAL_LM_MAPPING[foxlm.FoxConfig] is foxlm.FoxForCausalLM
    assert type(AutoConfig.for_model("fox")) is foxlm.FoxConfig
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(foxlm.FoxConfig())
    assert type(model) is foxlm.FoxForCausalLM


def test_registering_twice_is_harmless() -> None:
    from foxlm.modeling.registration import register_fox

    register_fox()
    register_fox()
    assert MODEL_FOR_CAUSAL_LM_MAPPING[foxlm.FoxConfig] is foxlm.FoxForCausalLM


def test_everything_promised_is_there() -> None:
    assert sorted(set(foxlm.__all__)) == foxlm.__all__
    assert set(foxlm.__all__) <= set(dir(foxlm))
    for name in foxlm.__all__:
        assert getattr(foxlm, name).__name__ == name
    with pytest.raises(AttributeError, match="'foxlm' has no attribute 'FoxModle'"):
        _ = foxlm.FoxModle


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    """`foxlm` registers with transformers when a command runs; nothing that only describes options imports it."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "foxlm", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0 and "convert" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "foxlm.cli" in imported
    assert not {"torch", "transformers", "numpy"} & imported


def test_commands_register_before_they_run(tmp_path: Path) -> None:
    code = """
import sys
sys.orig_argv[-1] = "/usr/bin/foxlm"
from foxlm.cli.errors import CommandLine
assert "transformers" not in sys.modules
app = CommandLine(help="")

@app.command()
def show() -> None:
    from transformers import AutoConfig
    print(type(AutoConfig.for_model("fox")).__name__)

app([])
"""
    assert run(code, tmp_path).strip() == "FoxConfig"


def wrong_imports(source: str) -> list[str]:
    """Relative imports that a bundle of flat files could not rewrite, and absolute ones of this package."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            # `from .mod import name` or `from ..folder.mod import name`, and whatever is not ours
            fits = node.level == 0 and parts[0] not in ("foxlm", *FOLDERS)
            fits |= node.level > 0 and bool(parts[0]) and (node.level < 2 or len(parts) > 1 or parts[0] not in FOLDERS)
            if not fits or any(alias.name == "*" for alias in node.names):
                wrong.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            wrong += [ast.unparse(node) for alias in node.names if alias.name.split(".")[0] in ("foxlm", *FOLDERS)]
    return wrong


def imported_at_once(body: list[ast.stmt]) -> list[ast.ImportFrom]:
    """Relative imports that run with the module: not those in functions, and not those for a type checker."""
    found: list[ast.ImportFrom] = []
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(node)
        elif isinstance(node, ast.If):
            found += imported_at_once(node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node.body)
        elif isinstance(node, ast.Try):
            found += imported_at_once(node.body)
    return found


def imports_of_parts(folder: Path) -> dict[str, set[str]]:
    """Of each part of a folder, a module at its root or a folder in it, which other parts it imports."""
    imports: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        part = path.relative_to(folder).with_suffix("").parts[0]
        for node in imported_at_once(ast.parse(path.read_text(encoding="utf-8")).body):
            source = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if source.is_relative_to(folder):
                imports.setdefault(part, set()).add(source.relative_to(folder).parts[0])
    return {part: others - {part} for part, others in imports.items()}


def test_imports_of_kernels_point_one_way() -> None:
    """Each folder could be one module; what chooses a backend imports the implementations, and not the reverse."""
    imports = imports_of_parts(ROOT / "kernels")
    assert imports["attention"] > {"backends", "pruning"} and imports["backends"] > {"portable", "reference"}
    assert tuple(TopologicalSorter(imports).static_order())[-1] in ("attention", "context_parallel")
    assert not [part for part, others in imports.items() if "context_parallel" in others]
    # Negative control.
    imports["decay"] = {"backends"}
    with pytest.raises(CycleError):
        TopologicalSorter(imports).prepare()


# Each imports only what stands before it.
ORDER = ("kernels", "modeling", "evaluation", "conversion", "foxlm", "examples")


def folders_imported(path: Path) -> set[str]:
    """Of the folders at the root, those that a module imports, wherever in it; what a type checker alone reads is not.

    ``import foxlm`` is none of them, and ``from foxlm import name`` the folder that the public name is defined in.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [x.body for x in ast.walk(tree) if isinstance(x, ast.If) and "TYPE_CHECKING" in ast.unparse(x.test)]
    for_types = {node for body in blocks for statement in body for node in ast.walk(statement)}
    found: set[str] = set()
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.startswith("foxlm.")]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = path.relative_to(ROOT).parts[: -node.level]
            modules = [".".join(("foxlm", *above, node.module or ""))]
        elif isinstance(node, ast.ImportFrom) and node.module == "foxlm":
            modules = [f"foxlm.{foxlm._MODULES.get(alias.name, '')}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foxlm."):
            modules = [str(node.module)]
        else:
            continue
        parts = [f"{module}.".split(".")[1] for module in modules]
        found |= {part if part in ORDER else "foxlm" for part in parts if part}
    return found - {path.relative_to(ROOT).parts[0]}


def test_imports_between_folders_point_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = {path: folders_imported(path) for folder in ORDER for path in (ROOT / folder).rglob("*.py")}
    wrong = {
        str(path.relative_to(ROOT)): later
        for path, others in imported.items()
        if (later := sorted(others & set(ORDER[ORDER.index(path.relative_to(ROOT).parts[0]) :])))
    }
    assert not wrong
    assert {"kernels", "modeling", "evaluation"} == set().union(
        *(others for path, others in imported.items() if (ROOT / "conversion") in path.parents)
    )
    # Negative control, of each form.
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "evaluation/plots").mkdir(parents=True)
    for line in (
        "def f():\n    from foxlm.conversion.graft import graft",
        "import foxlm.conversion.graft",
        "from ...conversion.graft import graft",
    ):
        (tmp_path / "evaluation/plots/new.py").write_text(line)
        assert folders_imported(tmp_path / "evaluation/plots/new.py") == {"conversion"}, line


def test_modules_that_ask_for_triton_are_named() -> None:
    page = (ROOT / "docs/design/tree.md").read_text(encoding="utf-8")
    start = page.index("- Modules that must work without Triton")
    rule = page[start : page.index("- `import foxlm` imports no kernels")]
    paths = [path for folder in ORDER for path in (ROOT / folder).rglob("*.py")]
    asking = [path for path in paths if "HAS_TRITON" in path.read_text(encoding="utf-8")]
    assert set(re.findall(r"`(\w+/[\w/]+\.py)`", rule)) == {path.relative_to(ROOT).as_posix() for path in asking}


FILES = sorted(path for folder in ("kernels", "modeling") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_can_be_rewritten_for_a_bundle(path: Path) -> None:
    assert not wrong_imports(path.read_text())


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("import torch", True),
        ("from torch import nn", True),
        ("from .cache_fox import check_cache", True),
        ("from ..kernels.decay import Decay", True),
        ("from . import cache_fox", False),
        ("from .. import kernels", False),
        ("from ..kernels import decay", False),
        ("from .a.b import c", True),
        ("from ...kernels.decay import Decay", True),
        ("import foxlm", False),
        ("from foxlm.kernels.decay import Decay", False),
        ("import kernels.decay", False),
        ("from .decay import *", False),
        ("def f():\n    from foxlm import FoxConfig", False),
    ],
)
def test_control_the_import_rule_tells_right_from_wrong(line: str, allowed: bool) -> None:
    assert (not wrong_imports(line)) == allowed


def test_version_is_stated_once() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: foxlm.__version__"
    # A literal, which building reads without importing the package.
    assert f'\n__version__ = "{foxlm.__version__}"\n' in (ROOT / "foxlm/__init__.py").read_text()
