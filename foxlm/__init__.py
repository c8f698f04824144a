"""foxlm: the Forgetting Transformer (FoX) for the Hugging Face ecosystem.

Importing this package registers FoX with transformers' Auto classes::

    import foxlm
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/to/a/fox/model")

The public names below are imported when they are first used.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from foxlm import _checkout  # noqa: F401 (first: it lets the imports below find their folders)

if TYPE_CHECKING:
    from foxlm.kernels.attention import forgetting_attention
    from foxlm.kernels.context_parallel.api import context_parallel_attention
    from foxlm.kernels.context_parallel.group import ContextParallel
    from foxlm.modeling.cache.paged import FoxPagedCache
    from foxlm.modeling.configuration_fox import FoxConfig, peft_targets
    from foxlm.modeling.layers.attention import FoxAttention
    from foxlm.modeling.layers.block import FoxDecoderLayer
    from foxlm.modeling.modeling_fox import (
        FoxForCausalLM,
        FoxForQuestionAnswering,
        FoxForSequenceClassification,
        FoxForTokenClassification,
        FoxModel,
        FoxPreTrainedModel,
    )

__version__ = "0.2.0"

__all__ = [
    "ContextParallel",
    "FoxAttention",
    "FoxConfig",
    "FoxDecoderLayer",
    "FoxForCausalLM",
    "FoxForQuestionAnswering",
    "FoxForSequenceClassification",
    "FoxForTokenClassification",
    "FoxModel",
    "FoxPagedCache",
    "FoxPreTrainedModel",
    "context_parallel_attention",
    "forgetting_attention",
    "peft_targets",
]

_MODULES = {
    name: module
    for module, names in {
        "kernels.attention": ["forgetting_attention"],
        "kernels.context_parallel.api": ["context_parallel_attention"],
        "kernels.context_parallel.group": ["ContextParallel"],
        "modeling.cache.paged": ["FoxPagedCache"],
        "modeling.configuration_fox": ["FoxConfig", "peft_targets"],
        "modeling.layers.attention": ["FoxAttention"],
        "modeling.layers.block": ["FoxDecoderLayer"],
        "modeling.modeling_fox": [x for x in __all__ if x.startswith(("FoxFor", "FoxModel", "FoxPreTrained"))],
    }.items()
    for name in names
}
"""The module of each public name."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A transformers that is too old is named here, before an import of its parts fails.
    importlib.import_module("foxlm.modeling.versions")
    value = getattr(importlib.import_module(f"foxlm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_console_command() -> bool:
    """Whether this process was started as ``foxlm ...`` or ``python -m foxlm ...``.

    There `foxlm --help` and errors in options would wait seconds for transformers, which registering imports. Each
    command registers FoX itself before it runs (`foxlm.cli.errors`). Processes that a command spawns are started
    otherwise and register on import.
    """
    # The script, or the module after -m: what stands before the arguments, of which sys.argv[0] says less.
    program = sys.orig_argv[-len(sys.argv) :][:1]
    return [os.path.splitext(os.path.basename(x))[0] for x in program] == ["foxlm"]


if not _is_console_command():
    from foxlm.modeling.registration import register_fox

    register_fox()
