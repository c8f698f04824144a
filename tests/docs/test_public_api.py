"""The public API stays: what was documented is still there, or warns and names what replaces it.

``public_api.json`` holds the list: public names, documented modules, parameters of functions,
configuration fields, commands and options.
"""

import dataclasses
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoConfig

import foxlm
from foxlm import FoxConfig
from foxlm.cli.app import app
from foxlm.modeling.remote_code import AUTO_MAP
from models import tiny_model

HELD: dict[str, Any] = json.loads(Path(__file__).with_name("public_api.json").read_text())
NAMES = [(module, name) for module, names in HELD["documented"].items() for name in names]
NAMES += [("foxlm", name) for name in HELD["names"] if ("foxlm", name) not in NAMES]
# Of these not the name warns but its use.
WARN_WHEN_USED: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("foxlm", "decoding_weights"): lambda used: used(tiny_model()).__enter__(),
}
# What left with the feature it belonged to: a simulator of clusters, and plots of benchmarks.
GONE = {
    "bench plan": {"--gpus", "--host-bandwidth", "--host-gpus", "--json", "FILE"},
    "bench plot": {"--case", "--json", "--out", "FILES"},
}


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_documented_name_is_there_or_names_its_successor(module: str, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = getattr(importlib.import_module(module), name)
        if (use := WARN_WHEN_USED.get((module, name))) is not None:
            use(value)
    assert value is not None
    said = [str(x.message) for x in caught if x.category is FutureWarning and x.filename == __file__]
    if module in sys.modules["foxlm._moved"].MOVED or use is not None:
        assert len(said) == 1 and f"{name} is " in said[0]
        for new in re.findall(r"is now (foxlm\.[\w.]+)", said[0]):
            new_module, _, new_name = new.rpartition(".")
            assert getattr(importlib.import_module(new_module), new_name) is value
    elif said:
        assert re.search(r"is now called \w+", said[0])


@pytest.mark.filterwarnings("ignore:.* is now:FutureWarning")
@pytest.mark.parametrize("function", HELD["parameters"])
def test_documented_function_keeps_its_parameters(function: str) -> None:
    module, _, name = function.rpartition(".")
    kept = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    missing = [parameter for parameter in HELD["parameters"][function] if parameter not in kept]
    assert not missing


def test_old_modules_have_their_documented_names_and_no_others() -> None:
    from foxlm._moved import MOVED

    for module, names in MOVED.items():
        assert set(names) == set(HELD["documented"][module])
        with pytest.raises(AttributeError, match="has no attribute 'other'"):
            _ = importlib.import_module(module).other


@pytest.mark.parametrize("name", HELD["config"])
def test_configuration_field_keeps_its_name_and_default(name: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(FoxConfig)}
    if name in fields:
        assert fields[name] == HELD["config"][name]
    else:
        with pytest.warns(FutureWarning, match=name):
            FoxConfig(**{name: HELD["config"][name]})


def test_saved_models_are_read_by_the_same_classes() -> None:
    assert HELD["auto_map"] == AUTO_MAP
    assert type(AutoConfig.for_model("fox")) is FoxConfig
    for reference in HELD["auto_map"].values():
        assert hasattr(foxlm, reference.rpartition(".")[2])


def options(command: Any, prefix: str = "") -> dict[str, set[str]]:
    """Options and arguments of each command and sub-command."""
    found: dict[str, set[str]] = {}
    for name, sub in command.commands.items():
        if hasattr(sub, "commands"):
            found |= options(sub, f"{prefix}{name} ")
        else:
            found[prefix + name] = {
                option
                for parameter in sub.params
                for option in (parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()])
            }
    return found


COMMANDS = options(typer.main.get_command(app))


@pytest.mark.parametrize("command", HELD["commands"])
def test_command_keeps_its_options(command: str) -> None:
    missing = set(HELD["commands"][command]) - GONE.get(command, set()) - COMMANDS.get(command, set())
    assert not missing
    assert command in COMMANDS or GONE.get(command) == set(HELD["commands"][command])
