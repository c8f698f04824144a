"""Merge the modules that a saved model needs into a few flat files, for `remote_code`.

transformers loads a model's code from files of one folder that import each other by ``from .module import name``. The
modules that `modeling_fox` needs, found by their relative imports, are joined by folder: those of ``kernels/hopper``
are sections of one file, ``kernels_hopper_triton.py``. Imports between sections of a file are dropped, those between
files rewritten, and those under ``if TYPE_CHECKING`` left out, with what only they need.

Modules share a file if nothing changes by it: a file holds its modules in an order in which each finds what it imports,
no module that needs Triton is imported with one that does not, and no two define the same name (see `clashes`). What
does not fit begins a file of its own.
"""

import ast
import builtins
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# What whoever loads the model has, beside Python itself. transformers asks for all that is imported outside of `try`.
_REQUIRED = {"huggingface_hub", "numpy", "torch", "transformers"}
_OPTIONAL = {"triton"}
_Import = ast.Import | ast.ImportFrom
# Of these, equal texts are equal values, and it does not matter which of two definitions a function finds.
_SAME_BY_TEXT = re.compile(r"\w+(: [^=]+)? = (logging\.get_logger\(__name__\)|tl\.constexpr\(.*\)|-?[\w.]+|'[^']*')")


@dataclass
class Module:
    """A module of ours and what merging needs to know of it.

    Attributes:
        path: its file.
        section: its path from the root, which heads its section.
        lines: its text.
        tree: the same parsed.
        imports: statements that run, wherever they stand, with the file of ours that each imports from, or None.
        needs: files of ours that must be there when it is imported.
        needs_triton: whether it cannot be imported without Triton.
        names: where what each of its top-level names stands for is from.
    """

    path: Path
    section: str
    lines: list[str]
    tree: ast.Module
    imports: dict[_Import, Path | None]
    needs: set[Path]
    needs_triton: bool
    names: dict[str, str]


def merge(entry: Path) -> dict[str, str]:
    """The text of each file by its name; the one with ``entry`` in it has its name.

    Args:
        entry: a module in a folder of the root.

    Raises:
        ValueError: a module imports in a way that cannot be rewritten, or a package that a user may not have.
    """
    modules = read_modules(entry)
    files = arrange(modules, entry)
    file_of = {module.path: name for name, run in files.items() for module in run}
    # What the entry imports first is to come first, whatever stands before it in its file.
    ours = ((node, file_of[path]) for node, path in modules[entry].imports.items() if path)
    first = next((f"from .{file} import {node.names[0].name}" for node, file in ours if file != entry.stem), "")
    merged = {f"{name}.py": _text(run, file_of, first if entry.stem == name else "") for name, run in files.items()}
    return dict(sorted(merged.items()))


def read_modules(entry: Path) -> dict[Path, Module]:
    """``entry`` and the modules of ours that it needs, in the order in which Python would run them."""
    modules: dict[Path, Module] = {}
    reading: set[Path] = set()

    def read(path: Path) -> None:
        if path in reading:
            return
        reading.add(path)
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, path)
        imports = {node: _imported_file(node, path) for node in _running_imports(tree)}
        at_import = set(_running_imports(tree, functions=False))
        needs = {file for node, file in imports.items() if file and node in at_import}
        for needed in sorted(needs, key=list(imports.values()).index):
            read(needed)
        always = [node for node in tree.body if isinstance(node, _Import)]
        needs_triton = any(_packages(node) & _OPTIONAL for node in always) or any(
            modules[file].needs_triton for node in always if (file := imports[node]) in modules
        )
        section = path.relative_to(entry.parents[1]).as_posix()
        modules[path] = Module(path, section, source.splitlines(keepends=True), tree, imports, needs, needs_triton, {})
        modules[path].names.update(_names(modules[path], modules))
        for file in imports.values():
            if file is not None:
                read(file)

    read(entry)
    return modules


def arrange(modules: dict[Path, Module], entry: Path) -> dict[str, list[Module]]:
    """The modules of each file by its name, in the order in which the files can be imported."""
    left = list(modules.values())
    # What Python runs first comes first.
    runs = [_run(_key(left[0]), left)]
    while left := [module for module in left if module not in runs[-1]]:
        runs.append(_next_run(left))
    files: dict[str, list[Module]] = {}
    for run in runs:
        folder, triton = _key(run[0])
        name = folder.replace("/", "_") + ("_triton" if triton else "" if "/" in folder else "_base")
        if name in files:
            name = f"{folder.replace('/', '_')}_{run[-1].path.stem}"
        files[entry.stem if any(module.path == entry for module in run) else name] = run
    assert sum(map(len, files.values())) == len(modules), "names of files differ"
    return files


def clashes(modules: Iterable[Module]) -> list[str]:
    """Names that keep modules of one folder from sharing a file, in words."""
    return [
        f"{one.section} and {other.section} both define {', '.join(names)}"
        for one, other in itertools.combinations(modules, 2)
        if _key(one) == _key(other) and (names := _clash(one, other))
    ]


def _key(module: Module) -> tuple[str, bool]:
    """What modules of one file have in common: the folder, and whether they need Triton."""
    return module.section.rpartition("/")[0], module.needs_triton


def _next_run(left: list[Module]) -> list[Module]:
    """The modules of the next file, so that files are few."""
    runs, whole = _possible_runs(left)
    if whole:
        # All that is left of a folder: nothing is gained by waiting.
        return whole[0]
    # Else the one after which most folders can be taken whole, or the longest.
    rests = [[module for module in left if module not in run] for run in runs]
    return max(zip(rests, runs, strict=True), key=lambda x: (len(_possible_runs(x[0])[1]), len(x[1])))[1]


def _possible_runs(left: list[Module]) -> tuple[list[list[Module]], list[list[Module]]]:
    """For each folder what can stand in one file next; and those of them that leave nothing of it."""
    counts = Counter(map(_key, left))
    runs = [run for key in counts if (run := _run(key, left))]
    return runs, [run for run in runs if len(run) == counts[_key(run[0])]]


def _run(key: tuple[str, bool], left: list[Module]) -> list[Module]:
    """Modules of ``left`` that can stand in one file next, given that all others have been placed."""
    run: list[Module] = []
    before = -1
    while len(run) > before:
        before = len(run)
        waiting = {module.path for module in left} - {module.path for module in run}
        for module in left:
            fits = module.path in waiting and _key(module) == key and not module.needs & waiting
            if fits and not any(_clash(module, other) for other in run):
                run.append(module)
                waiting.remove(module.path)
    return run


def _clash(one: Module, other: Module) -> list[str]:
    names = one.names.keys() & other.names.keys() - {"_", "__all__"}
    return sorted(name for name in names if one.names[name] != other.names[name])


def _names(module: Module, modules: dict[Path, Module]) -> dict[str, str]:
    """Where what each top-level name stands for is from: a package, a module of ours, or a text."""
    names: dict[str, str] = {}
    for node in _statements(module.tree.body):
        if isinstance(node, _Import):
            path = module.imports.get(node)
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) and path is None else ""
            for alias in node.names:
                name = alias.asname or (alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name)
                origin = f"{prefix}{alias.name if alias.asname or prefix else name}"
                names[name] = modules[path].names.get(alias.name, module.section) if path in modules else origin
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = module.section
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            text = ast.unparse(node)
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    names[target.id] = text if _SAME_BY_TEXT.fullmatch(text) else module.section
    # A name of Python's own would change what it means in the other modules of the file.
    return {name: f"{module.section}, of Python" if hasattr(builtins, name) else x for name, x in names.items()}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, those of conditions included, without imports for type checkers."""
    for node in body:
        if _is_for_types(node):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in _blocks(node):
                yield from _statements(block)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The lists of statements that a statement holds."""
    for field in ("body", "orelse", "finalbody"):
        if isinstance(block := getattr(node, field, None), list):
            yield block
    for handler in getattr(node, "handlers", ()):
        yield handler.body


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _running_imports(node: ast.AST, functions: bool = True) -> Iterator[_Import]:
    """Import statements in the order of the text, without those for type checkers; or only those run at import."""
    if isinstance(node, _Import):
        yield node
    if _is_for_types(node) or (not functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        return
    for child in ast.iter_child_nodes(node):
        yield from _running_imports(child, functions)


def _imported_file(node: _Import, path: Path) -> Path | None:
    """The file of ours that an import in ``path`` means; None if it means a package that a user has."""
    if isinstance(node, ast.ImportFrom) and node.level:
        parts = node.module.split(".") if node.module else []
        file = path.parents[node.level - 1].joinpath(*parts).with_suffix(".py")
        if not parts or any(alias.name == "*" for alias in node.names) or not file.is_file():
            raise ValueError(
                f"{path.name}, line {node.lineno}: an import of our own must be 'from .module import name' or "
                f"'from ..folder.module import name', got {ast.unparse(node)!r}"
            )
        return file
    if unknown := sorted(_packages(node) - _REQUIRED - _OPTIONAL - sys.stdlib_module_names):
        raise ValueError(
            f"{path.name}, line {node.lineno}: a model's code may import modules of its own by 'from .module import "
            f"name', Python's own and {sorted(_REQUIRED | _OPTIONAL)}, got {unknown[0]}"
        )
    return None


def _packages(node: _Import) -> set[str]:
    """Top-level packages that an absolute import names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {node.module.partition(".")[0]} if node.level == 0 and node.module else set()


def _text(modules: list[Module], file_of: dict[Path, str], first: str) -> str:
    """A file of the modules, each a section under its path, after a ``first`` line."""
    imported = {first}
    sections = [first] if first else []
    for module in modules:
        lines = list(module.lines)
        edits = sorted(_edits(module, module.tree.body, file_of, imported), key=lambda x: x[0].lineno)
        for node, new in reversed(edits):
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in new]
        kept = (line for line in lines if line.strip() != "# isort: split")
        sections.append(f"# {module.section}\n\n{''.join(kept).strip()}\n")
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n".join(sections))


def _edits(
    module: Module, body: list[ast.stmt], file_of: dict[Path, str], imported: set[str], top: bool = True
) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Statements and the lines in their place: imports, and conditions for type checkers.

    Args:
        module: whose they are.
        body: a list of statements of it.
        file_of: the name of each module's file.
        imported: what the file's top-level imports have named so far, one ``from x import y`` each; grows.
        top: whether ``body`` is the module's own.
    """
    edits: list[tuple[ast.stmt, list[str]]] = []
    for node in body:
        if _is_for_types(node):
            edits.append((node, []))
        elif isinstance(node, _Import):
            edits.append((node, _rewritten(node, module, file_of, imported, top)))
        else:
            for block in _blocks(node):
                yield from _edits(module, block, file_of, imported, top=False)
    # A block that holds nothing else must hold something.
    if not top and edits and len(edits) == len(body) and not any(lines for _, lines in edits):
        edits[0] = (edits[0][0], ["pass"])
    yield from edits


def _rewritten(node: _Import, module: Module, file_of: dict[Path, str], imported: set[str], top: bool) -> list[str]:
    path = module.imports[node]
    if path is not None and file_of[path] == file_of[module.path]:
        return [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname not in (None, alias.name)]
    start = "import"
    if isinstance(node, ast.ImportFrom):
        start = f"from {f'.{file_of[path]}' if path is not None else node.module} import"
    names = {ast.unparse(alias): f"{start} {ast.unparse(alias)}" for alias in node.names}
    if top:
        names = {name: text for name, text in names.items() if text not in imported}
        imported.update(names.values())
    if not names:
        return []
    line = f"{start} {', '.join(names)}"
    # In `try`, so that transformers does not refuse to load the model where the package is missing.
    return ["try:", f"    {line}", "except ImportError: raise"] if top and _packages(node) & _OPTIONAL else [line]
