"""Settings that every test shares: no network, one share of the cores per worker, the same seed each time."""

import os
import sys
from collections.abc import Iterator

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# Each worker of pytest-xdist would otherwise start as many threads as there are cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Not every system tells which cores a process may use.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
torch.set_num_threads(max(1, _CORES // _WORKERS))

# No deadline: the first example of a test pays for compilation and warm-up. The same examples at every run: a
# failure in CI must repeat elsewhere.
settings.register_profile("foxlm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("foxlm")


@pytest.fixture(autouse=True, scope="session")
def small_chunks_interpreted() -> Iterator[None]:
    """Triton's interpreter takes a second to scan 1,024 numbers; shorter chunks are more of them besides."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            patch.setattr("foxlm.kernels.portable.scan._CHUNK", 64)
            patch.setattr("foxlm.kernels.pruning.search._SCAN", 16)
        yield


@pytest.fixture(autouse=True, scope="session")
def short_prompts_pruned() -> Iterator[None]:
    """What is tested of pruning in models holds for prompts of any length, and long ones take long."""
    from foxlm.modeling.attention_settings import pruned_at_any_length

    with pruned_at_any_length():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whatever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_recordings() -> None:
    """Tests may change what kernels are launched with."""
    if replay := sys.modules.get("foxlm.kernels.launches.replay"):
        replay.forget_all()
