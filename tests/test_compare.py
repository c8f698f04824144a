"""The comparison's script does not take a model for one that was asked for with other settings."""

import json
import runpy
from pathlib import Path

import pytest
import typer

SCRIPT = Path(__file__).parent.parent / "examples" / "compare.py"
RECIPE = {"size": "125m", "length": 16384, "batch": 4, "muon_rate": 6e-3, "adamw_rate": 3e-3}


@pytest.mark.parametrize(("option", "value"), [("steps", 20), ("length", 8192), ("muon_rate", 4e-3)])
def test_a_model_of_other_settings_is_refused(tmp_path: Path, option: str, value: float) -> None:
    train = runpy.run_path(str(SCRIPT))["train"]
    (tmp_path / "fox-pro").mkdir()
    (tmp_path / "fox-pro" / "training.json").write_text(json.dumps({"steps": 10, "recipe": RECIPE}))
    train("fox-pro", tmp_path, steps=10)
    train("fox-pro", tmp_path)
    with pytest.raises(typer.BadParameter, match=f"trained with {option} .*, now it is {value}"):
        train("fox-pro", tmp_path, **{option: value})
