"""What a measurement was made with: versions, commit, device, command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import foxlm


def provenance(device: str, seed: int, packages: tuple[str, ...] = ()) -> dict[str, str | int]:
    """Facts that make a result repeatable.

    Args:
        device: ``"cpu"`` or a CUDA device.
        seed: of the run.
        packages: distributions to name beside torch and transformers.

    Returns:
        ``command``, ``commit`` (of the checkout that foxlm runs from, with ``+changes`` if files differ; ``"none"``
        outside one), ``device``, ``threads``, ``seed``, ``python``, and the version of each package.
    """
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return {
        "command": f"{name} {shlex.join(sys.argv[1:])}".strip(),
        "commit": _commit(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "foxlm": foxlm.__version__,
        **{name: _version(name) for name in ("torch", "transformers", *packages)},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(encoding="utf-8") if info.exists() else "", re.MULTILINE)
    return f"{cores} CPU cores ({found[1] if found else platform.processor() or platform.machine()})"


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    # Only a checkout of foxlm itself: an installed copy may lie inside some other project's repository.
    if not (root / ".git").exists() or not (root / "foxlm").is_dir():
        return "none"

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # `git describe --dirty` rewrites the index in any case, and leaves a lock behind if it is ended meanwhile.
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"
