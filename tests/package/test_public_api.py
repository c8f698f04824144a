"""The public API stays: what was documented is still there.

``public_api.json`` holds the list: public names, documented modules, parameters of functions,
configuration fields, commands and options.
"""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoConfig

import foxlm
from foxlm import FoxConfig
from foxlm.cli.app import app
from foxlm.modeling.remote_code import AUTO_MAP

HELD: dict[str, Any] = json.loads(Path(__file__).with_name("public_api.json").read_text())
NAMES = [(module, name) for module, names in HELD["documented"].items() for name in names]
NAMES += [("foxlm", name) for name in HELD["names"] if ("foxlm", name) not in NAMES]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_documented_name_is_there(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("function", HELD["parameters"])
def test_documented_function_keeps_its_parameters(function: str) -> None:
    module, _, name = function.rpartition(".")
    kept = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    missing = [parameter for parameter in HELD["parameters"][function] if parameter not in kept]
    assert not missing


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
    assert set(HELD["commands"][command]) <= COMMANDS[command]
