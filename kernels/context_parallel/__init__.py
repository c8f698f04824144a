"""Sequences that several ranks share: public names, imported when they are used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import context_parallel_attention
    from .group import ContextParallel
    from .partition import Segment, contiguous, zigzag
    from .shards import CommunicationVolume

__all__ = [
    "CommunicationVolume",
    "ContextParallel",
    "Segment",
    "context_parallel_attention",
    "contiguous",
    "zigzag",
]

_MODULES = {
    "CommunicationVolume": "shards",
    "ContextParallel": "group",
    "Segment": "partition",
    "context_parallel_attention": "api",
    "contiguous": "partition",
    "zigzag": "partition",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
