"""Random cases within a budget of seconds: the body of every test marked `fuzz`.

    @pytest.mark.fuzz
    def test_some_function():
        fuzz(one_case)

where ``one_case(rng)`` draws everything from ``rng`` (or from torch, which is seeded too) and fails if something is
wrong. Without FOXLM_FUZZ_SECONDS each test takes its default budget and always the same cases in the same order; with
it, so many seconds and new cases at every run.
"""

import os
import random
import shlex
import sys
import time
from collections.abc import Callable

import torch


def fuzz(case: Callable[[random.Random], None], seconds: float = 3.0) -> None:
    """Run ``case`` with one seed after another, at least once and until the budget is spent.

    Args:
        case: one random case; raises if it fails.
        seconds: the budget without FOXLM_FUZZ_SECONDS, in seconds; the last case may exceed it.
    """
    only, budget = os.environ.get("FOXLM_FUZZ_SEED"), os.environ.get("FOXLM_FUZZ_SECONDS")
    seed = int(only) if only else time.time_ns() // 1_000_000 if budget else 0
    end = time.monotonic() + float(budget or seconds)
    while True:
        torch.manual_seed(seed)
        try:
            case(random.Random(seed))
        except BaseException:
            interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
            test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
            print(
                f'to see this one case again: {interpreted}FOXLM_FUZZ_SEED={seed} pytest -m "" {shlex.quote(test)}',
                file=sys.stderr,
            )
            raise
        seed += 1
        if only or time.monotonic() >= end:
            return
