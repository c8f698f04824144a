"""The versions of transformers that this code is made for, and what they call differently.

All that differs between them is here. transformers 5.24 renamed the cache, ``past_key_values``, to ``cache``: as the
argument of models, layers and `generate`, and as the field of outputs. Callers may use either name as an argument, with
any version; outputs are transformers' own and have the name of the version installed, from 5.24 on both.
"""

import warnings
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.import_utils import is_torchdynamo_compiling

CACHE_NAMES = ("cache", "past_key_values")
# Asked of transformers itself, not of its version: a development version has what it has.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the transformers installed calls the cache, as an argument and in outputs."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given by one of its two names.

    Raises:
        ValueError: by both.
    """
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    if CACHE == "cache" and not is_torchdynamo_compiling():
        # As transformers' own models do.
        message = "past_key_values is deprecated in transformers 5.24 and newer, which call it cache: pass cache="
        warnings.warn(message, FutureWarning, stacklevel=2)
    return past_key_values


def with_one_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the cache, if there is one, under the name that the transformers installed reads."""
    given = {name: arguments.get(name) for name in CACHE_NAMES}
    cache = one_cache(**given)
    others = {name: value for name, value in arguments.items() if name not in given}
    return others if cache is None else others | {CACHE: cache}


def cache_of(outputs: Any) -> Any:
    """The cache in what a model or `generate` returned; None where there is none."""
    return getattr(outputs, CACHE)
