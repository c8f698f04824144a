"""A few kernel tests in Triton's interpreter; `make test-slow` runs all of them there.

In a process of their own: the interpreter takes the place of the compiler when kernels are defined.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foxlm.kernels.backends import HAS_TRITON

ROOT = Path(__file__).parents[2]
WRONG = """
import pytest
from kernel_device import INTERPRETED

@pytest.mark.kernels
@pytest.mark.smoke
def test_wrong():
    assert not INTERPRETED
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_some_kernels_pass_and_what_is_wrong_fails(tmp_path: Path) -> None:
    """The tests marked `smoke` pass, and a wrong one beside them, the negative control, is the only one that fails."""
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text(WRONG)
    # A GPU, if there is one, is hidden: these tests are to run on the CPU.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-c", "pyproject.toml"]
    command += ["-m", "smoke and kernels", "tests/kernels", str(wrong)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "FAILED ::test_wrong" in said and re.search(r"\n1 failed, \d+ passed", said), said
    assert "or TRITON_INTERPRET=1" not in said, "skipped"
