"""Refuse symbolic links that lead out of a model's folder, except into the blobs of the Hub's cache."""

from pathlib import Path


def check_links(folder: Path) -> None:
    """Raise a `ValueError` that names the first link in ``folder`` that leads out of it, is dangling or is cyclic.

    In the Hub's cache files are links from ``snapshots/REVISION/`` to ``blobs/``, which is accepted.
    """
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not is_inside(file, folder):
            raise ValueError(
                f"{file} is a link that leads out of its folder or to nothing: put the file itself there "
                f"(cp -L copies a folder and follows its links)"
            )


def is_inside(file: Path, folder: Path) -> bool:
    """Whether ``file``, with links followed, exists and lies in ``folder`` or in the blobs of its cache."""
    try:
        target, root = file.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):  # a cycle is a RuntimeError before Python 3.13
        return False
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parents[1] / "blobs")
    return any(root in (target, *target.parents) for root in roots)
