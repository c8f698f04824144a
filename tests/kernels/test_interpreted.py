"""The tests of the kernels, on the CPU through Triton's interpreter.

Each file runs in a process of its own: the interpreter takes the place of the compiler when kernels are defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foxlm.kernels.backends import HAS_TRITON

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")]

TESTS = Path(__file__).parent
# What to run, longest first. In test_block_search.py the same functions take kernels then.
RUNS = {
    "portable/test_accuracy.py": [],
    "portable/test_kernel_operators.py": [],
    "portable/test_decode.py": [],
    "../modeling/generation/test_decoding_on_kernels.py": [],
    "pruning/test_block_search.py": ["-m", "not gpu"],
    "pruning/test_rounding_margins.py": ["-m", "not gpu"],
    "../distributed/test_row_copy.py": ["-m", "gpu"],
    "test_attention_fuzz.py": ["-m", "gpu"],
}


def run_interpreted(file: str, *options: str) -> subprocess.CompletedProcess[str]:
    # A GPU, if there is one, is hidden: these tests are to run on the CPU.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", str(TESTS / file), *options]
    return subprocess.run(command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("file", "options"), RUNS.items(), ids=list(RUNS))
def test_kernels_pass_interpreted(file: str, options: list[str]) -> None:
    done = run_interpreted(file, *options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_fails_interpreted_is_seen(tmp_path: Path) -> None:
    """Negative control: kernels do run there, and a failure is one here."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "import torch\n"
        "from foxlm.kernels.backends import runs_kernels\n\n\n"
        "def test_runs():\n    assert runs_kernels(torch.empty(0))\n\n\n"
        "def test_fails():\n    assert not runs_kernels(torch.empty(0))\n"
    )
    done = run_interpreted(str(file))
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout
