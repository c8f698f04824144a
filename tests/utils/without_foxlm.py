"""Run code in a fresh process in which foxlm, and whatever else is named, cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

_BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in {names}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} can be imported")
"""


def run_without(names: tuple[str, ...], code: str, folder: Path, **environment: str) -> str:
    """Standard output of ``code``, run in ``folder`` with a cache of its own for remote code; fails if it fails."""
    settings = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = f"{_BLOCK.format(names=names)}\n{code}" if names else code
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
