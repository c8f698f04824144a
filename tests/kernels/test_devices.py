"""What is asked of a GPU is asked once, and its context is entered only where it is not the current one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foxlm.kernels import devices
from foxlm.kernels.devices import capability_of, on_device_of


def on_gpu(index: int) -> Any:
    return SimpleNamespace(is_cuda=True, get_device=lambda: index)


def test_each_gpu_is_asked_once(monkeypatch):
    asked = []

    def ask(index: int) -> tuple[int, int]:
        asked.append(index)
        return 9, index

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
    devices._capability.cache_clear()
    found = [capability_of(on_gpu(index)) for index in (0, 1, 0, 1)]
    devices._capability.cache_clear()
    assert found == [(9, 0), (9, 1)] * 2
    assert asked == [0, 1]


def test_a_context_is_for_another_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not isinstance(on_device_of(on_gpu(1)), torch.cuda.device_of)
    entered = on_device_of(on_gpu(0))
    assert isinstance(entered, torch.cuda.device_of)
    assert entered.idx == 0


def test_nothing_is_asked_of_cuda_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was asked"))
    with on_device_of(torch.zeros(1)):
        pass
