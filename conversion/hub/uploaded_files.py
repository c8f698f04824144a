"""The files of a folder that are uploaded, those that training left there, and those that the Hub refuses."""

from collections import Counter
from pathlib import Path

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, FORBIDDEN_FOLDERS, filter_repo_objects

# The Hub's own limits for one file, and for the large files of one commit (the documentation of its client).
_LARGEST_BYTES = 50 * 10**9
_MOST_FILES = 25_000
# What Trainer, accelerate and DeepSpeed write beside a model, to go on training or to look back at it. A model has no
# use for any of it, and much of it is pickled.
OF_TRAINING = (
    *("checkpoint-[0-9]*/*", "runs/*", "global_step[0-9]*/*", "pytorch_model_fsdp_[0-9]*/*", "optimizer_[0-9]*/*"),
    *("training_args.bin", "trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
    *("rng_state.pth", "rng_state_[0-9]*.pth", "latest", "zero_to_fp32.py"),
    *("all_results.json", "train_results.json", "eval_results.json"),
)


def uploaded_files(folder: Path) -> dict[str, Path]:
    """The files to upload, without those `OF_TRAINING`, and broken links, which are skipped; by name in the repository.

    They are what `HfApi.upload_folder` takes with these as its ``ignore_patterns``.
    """
    files = _files(folder)
    patterns = [*DEFAULT_IGNORE_PATTERNS, *OF_TRAINING]
    return {name: files[name] for name in filter_repo_objects(files, ignore_patterns=patterns)}


def left_out(folder: Path) -> list[str]:
    """What is left out of the upload as `OF_TRAINING`: names of files, and of folders with a slash behind them."""
    names = filter_repo_objects(_files(folder), allow_patterns=list(OF_TRAINING))
    return sorted({name if "/" not in name else f"{name.split('/')[0]}/" for name in names})


def _files(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path for name, path in paths.items() if path.is_symlink() or not path.is_dir()}


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
