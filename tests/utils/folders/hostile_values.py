"""Values as a file edited by hand may hold them."""

import random
from typing import Any


def any_value(rng: random.Random) -> Any:
    """Anything that JSON can hold, and what Python reads of it."""
    simple: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2.5,
        1e30,
        -1e-30,
        10**9,
        10**19,
        float("nan"),
        float("inf"),
    ]
    simple += ["", "0", "fox", "llama", "\0", "../..", "\ud800", "float16", "x" * 300]
    kind = rng.random()
    if kind < 0.8:
        return rng.choice(simple)
    if kind < 0.9:
        return [any_value(rng) for _ in range(rng.randrange(3))]
    return {str(rng.choice(simple)): any_value(rng) for _ in range(rng.randrange(3))}
