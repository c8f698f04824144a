"""The files of a folder that the Hub's client uploads, and those that it or the Hub refuses."""

from collections import Counter
from pathlib import Path

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, FORBIDDEN_FOLDERS, filter_repo_objects

# The Hub's own limits for one file, and for the large files of one commit (the documentation of its client).
_LARGEST_BYTES = 50 * 10**9
_MOST_FILES = 25_000


def uploaded_files(folder: Path) -> dict[str, Path]:
    """The files that `HfApi.upload_folder` uploads, and broken links, which it skips; by name in the repository."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in paths.items() if path.is_symlink() or not path.is_dir()}
    return {name: files[name] for name in filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS)}


def refused_by_the_hub(files: dict[str, Path]) -> list[str]:
    """The names that cannot be uploaded, or that break on some systems, each with the reason."""
    refused = []
    folded = Counter(name.casefold() for name in files)
    for name, path in files.items():
        if any(part in FORBIDDEN_FOLDERS for part in name.split("/")):
            refused.append(f"{name} (no path may have {' or '.join(FORBIDDEN_FOLDERS)})")
        elif not name.isprintable() or "\\" in name:
            refused.append(f"{name!r} (characters that a name cannot have)")
        elif folded[name.casefold()] > 1:
            refused.append(f"{name} (the same as another, but for upper and lower case)")
        elif path.is_file() and path.stat().st_size > _LARGEST_BYTES:
            refused.append(f"{name} (more than {_LARGEST_BYTES / 1e9:.0f} GB; save_pretrained makes shards)")
    if len(files) > _MOST_FILES:
        refused.append(f"{len(files):,} files (one commit takes {_MOST_FILES:,})")
    return refused
