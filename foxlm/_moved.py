"""Documented names where they were before: each works for one release, with a warning that says where it is now."""

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# Modules that are gone, and where their documented names are now.
MOVED = {
    "foxlm.conversion.deal_heads": {"deal_heads": "foxlm.conversion.balance_heads.balance_heads"},
    "foxlm.conversion.model_card": {"write_model_card": "foxlm.conversion.hub.model_card.write_model_card"},
    "foxlm.conversion.publish": {
        "check_folder": "foxlm.conversion.hub.publish.check_folder",
        "push_folder": "foxlm.conversion.hub.publish.push_folder",
    },
    "foxlm.evaluation.harness.options": {"Options": "foxlm.evaluation.lm_eval.options.Options"},
    "foxlm.evaluation.harness.run": {"evaluate": "foxlm.evaluation.lm_eval.run.evaluate"},
    "foxlm.kernels.token_split": {
        "Segment": "foxlm.kernels.context_parallel.partition.Segment",
        "balanced": "foxlm.kernels.context_parallel.partition.zigzag",
        "contiguous": "foxlm.kernels.context_parallel.partition.contiguous",
    },
    "foxlm.modeling.sharding": {
        "FoxParallelismConfig": "foxlm.modeling.parallel.fsdp.FoxParallelismConfig",
        "prepare_fsdp2": "foxlm.modeling.parallel.fsdp.prepare_fsdp2",
        "save_whole_model": "foxlm.modeling.parallel.fsdp.save_whole_model",
        "shard_forget_gates": "foxlm.modeling.parallel.fsdp.shard_forget_gates",
    },
}


class _MovedModule(ModuleType):
    """Stands in ``sys.modules`` for a module that is gone."""

    def __getattr__(self, name: str) -> Any:
        new = MOVED[self.__name__].get(name)
        if new is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        message = f"{self.__name__}.{name} is now {new}; the old name goes in the next release"
        warnings.warn(message, FutureWarning, stacklevel=2)
        module, _, new_name = new.rpartition(".")
        return getattr(importlib.import_module(module), new_name)

    def __dir__(self) -> list[str]:
        return sorted(MOVED[self.__name__])


def keep_old_modules() -> None:
    """Let modules that are gone be imported still."""
    for name in MOVED:
        sys.modules.setdefault(name, _MovedModule(name, "Moved: see `foxlm._moved`."))
