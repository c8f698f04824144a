"""What PEFT adapts in a FoX model when the user names no `target_modules`: the projections it adapts in a Llama."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

_PEFT_CONSTANTS = "peft.utils.constants"


def register_peft_defaults() -> None:
    """Tell PEFT about FoX: now if PEFT is loaded, else as soon as it is. Importing it here would cost seconds."""
    if _PEFT_CONSTANTS in sys.modules:
        _extend(sys.modules[_PEFT_CONSTANTS])
    elif not any(type(finder).__name__ == _ExtendPeft.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtendPeft())


def _extend(constants: ModuleType) -> None:
    # One mapping from model types to target modules for each method: LoRA, IA3, LNTuning, ...
    for mapping in vars(constants).values():
        if isinstance(mapping, dict) and "llama" in mapping:
            mapping.setdefault("fox", mapping["llama"])


class _ExtendPeft(importlib.abc.MetaPathFinder):
    """Extends PEFT's constants when they are first imported, before its other modules copy them; then steps aside."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _PEFT_CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec
