"""The versions of transformers that this code is made for, and what they call differently.

All that differs between them is here. transformers 5.24 renamed the cache, ``past_key_values``, to ``cache``: as the
argument of models, layers and `generate`, and as the field of outputs. Callers may use either name as an argument, with
any version; outputs are transformers' own and have the name of the version installed, from 5.24 on both.

Importing this module checks the version. foxlm and a model's own code import it before anything else of transformers.
"""

import re
import warnings
from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.import_utils import is_torchdynamo_compiling

logger = logging.get_logger(__name__)

OLDEST, NEWEST = "5.17", "5.24"
"""The first and the last minor version of transformers that this code was tried with."""


def check_transformers(version: str) -> None:
    """Warn once where ``version`` of transformers is above the range; it may have renamed what is passed to models.

    Raises:
        ImportError: it is below.
    """
    found, oldest, newest = (tuple(map(int, re.findall(r"\d+", x)[:2])) for x in (version, OLDEST, NEWEST))
    if found < oldest:
        raise ImportError(
            f"FoX needs transformers {OLDEST} to {NEWEST}, got {version}: pip install 'transformers>={OLDEST}'"
        )
    if found > newest:
        logger.warning_once(
            f"FoX was tried with transformers {OLDEST} to {NEWEST}, not with {version}, which may differ: update foxlm "
            f"(the code of a published model: by who published it), or pip install 'transformers=={NEWEST}.*'"
        )


check_transformers(transformers.__version__)

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
        message = "`past_key_values` is deprecated in transformers 5.24 and newer, which call it cache: pass cache="
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
