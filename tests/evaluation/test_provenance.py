"""What results say of the checkout that they were made with."""

import os
import subprocess
from pathlib import Path

import pytest

from foxlm.evaluation import provenance


def test_the_commit_is_read_without_writing_to_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git would refresh its index, and leave a lock that stops all later commands if the process ends meanwhile."""
    file = tmp_path / "foxlm" / "app.py"
    file.parent.mkdir()
    file.write_text("1\n")

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    # Of another time, with what it had: what git's index says of it is stale.
    later = file.stat().st_mtime_ns + 10**10
    os.utime(file, ns=(later, later))
    index = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "evaluation" / "provenance.py"))
    commit = provenance.provenance("cpu", 0)["commit"]
    assert len(str(commit)) == 40
    assert (tmp_path / ".git" / "index").read_bytes() == index
    file.write_text("2\n")
    assert provenance.provenance("cpu", 0)["commit"] == f"{commit}+changes"
