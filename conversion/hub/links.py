"""Links in a model's folder: files are read from inside of it, or from where the Hub's client keeps them."""

from pathlib import Path


def check_links(folder: Path) -> None:
    """Raise a `ValueError` that names the first file in ``folder`` that is a link to somewhere else, or in a circle.

    In the Hub's cache files are links from ``snapshots/REVISION/`` to ``blobs/``, which is inside too.
    """
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not is_inside(file, folder):
            raise ValueError(
                f"{file} is a link that leaves its folder, or leads nowhere: put the file itself there "
                f"(cp -L copies a folder with what its links mean)"
            )


def is_inside(file: Path, folder: Path) -> bool:
    """Whether what ``file`` names, links followed, is there and lies in ``folder``, or in the blobs of its cache."""
    try:
        target, root = file.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):  # a circle is a RuntimeError before Python 3.13
        return False
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parents[1] / "blobs")
    return any(root in (target, *target.parents) for root in roots)
