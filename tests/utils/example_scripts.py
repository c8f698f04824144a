"""What tests of the example scripts share: the scripts as modules, and options for tiny models."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from transformers import Trainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
QUIET = ["--use_cpu", "--report_to", "none", "--logging_steps", "1", "--disable_tqdm", "true"]
QUIET += ["--per_device_train_batch_size", "4"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # HfArgumentParser looks up type hints of the script's dataclasses by module name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
