"""Several processes in a test: results by rank, errors with their traceback, nothing left running."""

import time
from pathlib import Path

import pytest

from ranks import RankError, run_ranks


def test_each_rank_returns_its_result() -> None:
    assert run_ranks("rank_checks:add_up", 2, 2.0) == [(0, 6.0, 1), (1, 6.0, 1)]


def test_a_failed_rank_is_named_and_the_others_do_not_wait_for_it() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)on 2 ranks failed\nrank 1 raised:.*fail_on_one.*no such luck"):
        run_ranks("rank_checks:fail_on_one", 2, timeout=100)
    assert time.monotonic() - started < 60


def test_a_time_limit_ends_all_that_was_started(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)not done after 5 s\n.*rank 0 was still running"):
        run_ranks("rank_checks:hang", 1, str(tmp_path / "child"), timeout=5, group=False)
    written = (tmp_path / "child").stat().st_size
    assert written > 0
    time.sleep(0.5)
    assert (tmp_path / "child").stat().st_size == written
