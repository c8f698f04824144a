"""Run code in a fresh process in which foxlm, and whatever else is named, cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

# None blocks an import, as where the package is not installed.
_BLOCK = "import sys\nsys.modules.update(dict.fromkeys({names}))"


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
