"""Which keys a query may skip: public names, imported when they are used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .prune import first_kept, share_skipped
    from .rules import centered

_MODULES = {"centered": "rules", "first_kept": "prune", "share_skipped": "prune"}
__all__ = ["centered", "first_kept", "share_skipped"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
