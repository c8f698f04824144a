"""The helper of the tests marked `fuzz`: budgets, seeds, and how a failure is repeated."""

import random

import pytest
import torch

from fuzz import fuzz


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "SECONDS"):
        monkeypatch.delenv(f"FOXLM_FUZZ_{name}", raising=False)


def drawn(count: int) -> list[tuple[float, float]]:
    """What the first ``count`` cases draw; the next one fails."""
    numbers: list[tuple[float, float]] = []

    def case(rng: random.Random) -> None:
        assert len(numbers) < count
        numbers.append((rng.random(), torch.rand(()).item()))

    with pytest.raises(AssertionError):
        fuzz(case, seconds=60.0)
    return numbers


def test_cases_differ_and_are_the_same_at_each_run() -> None:
    assert len(set(drawn(5))) == 5
    assert drawn(5) == drawn(5)


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = drawn(3)
    message = capsys.readouterr().err
    assert "FOXLM_FUZZ_SEED=3 pytest" in message and "test_fuzz.py::test_a_failure_says" in message
    monkeypatch.setenv("FOXLM_FUZZ_SEED", "2")
    again: list[float] = []
    fuzz(lambda rng: again.append(rng.random()))
    assert again == [numbers[2][0]]


@pytest.mark.parametrize("budget", ["0", "0.2"])
def test_the_budget_ends_it_after_one_case_at_least(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOXLM_FUZZ_SECONDS", budget)
    seen: list[float] = []
    fuzz(lambda rng: seen.append(rng.random()), seconds=1e9)
    assert len(set(seen)) == len(seen) >= (1 if budget == "0" else 2)
