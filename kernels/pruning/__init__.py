"""Which keys a query may skip: public names, imported when they are used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rules import centered, first_kept, share_skipped

__all__ = ["centered", "first_kept", "share_skipped"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.rules"), name)
