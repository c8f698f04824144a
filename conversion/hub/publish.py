"""Check a model's folder and upload it to the Hub."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

import foxlm
from foxlm.conversion.hub import checks as folder_checks
from foxlm.conversion.hub.uploaded_files import OF_TRAINING
from foxlm.kernels.argument_types import typed

_CHECKS: dict[str, Callable[[Path, Collection[str]], str]] = {
    "configuration": folder_checks.check_configuration,
    "files": folder_checks.check_files,
    "contents": folder_checks.check_contents,
    "secrets": folder_checks.check_secrets,
    "code": folder_checks.check_code,
    "weights": folder_checks.check_weights,
    "tokenizer": folder_checks.check_tokenizer,
    "card": folder_checks.check_card,
    "loading": folder_checks.check_loading,
}
# The folder's code is run only if these are in order.
_BEFORE_CODE = {"configuration", "files", "contents", "code"}
# Weights are held against a model that transformers builds, with what the configuration names.
_BEFORE = {"weights": {"code"}, "tokenizer": _BEFORE_CODE, "loading": _BEFORE_CODE | {"weights", "tokenizer"}}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: of the check.
        passed: whether all is well.
        found: in words, what is there or what is wrong.
    """

    name: str
    passed: bool
    found: str


@typed
def check_folder(folder: str | Path, allow_code: Collection[str] = ()) -> Iterator[Check]:
    """Run every check, one after the other; the last takes some seconds more than loading the model twice.

    Args:
        folder: the model's.
        allow_code: code beside the library's own that may be there, and is run by the last check: names of files in
            ``folder``, or references such as ``"owner/name--module.Class"``.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be one that save_pretrained made, got {folder}")
    failed: set[str] = set()
    for name, check in _CHECKS.items():
        if unready := failed & _BEFORE.get(name, set()):
            yield Check(name, False, f"not tried, because of {', '.join(sorted(unready))}")
            continue
        try:
            found = Check(name, True, check(folder, allow_code))
        except ValueError as error:
            failed.add(name)
            found = Check(name, False, str(error))
        except Exception as error:  # a file may be wrong in any way
            failed.add(name)
            found = Check(name, False, f"{type(error).__name__}: {error}")
        yield found


@typed
def push_folder(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder to the Hub, without checkpoints and other files of training; run `check_folder` first.

    Args:
        folder: the model's.
        repo_id: ``"name"`` or ``"owner/name"``; made if it is not there.
        private: make it private; an existing public one is refused.

    Returns:
        Where it can be seen.

    Raises:
        ValueError: that repository is public and ``private`` is asked for.
        RuntimeError: the Hub could not be reached, or refused; the message says why.
    """
    hub = HfApi()
    try:
        # The Hub's own judgement of the card, before a repository is made.
        ModelCard.load(Path(folder) / "README.md").validate()
        repo_id = hub.create_repo(repo_id, private=True if private else None, exist_ok=True).repo_id
        public = private and not hub.model_info(repo_id).private
        if not public:
            message = f"Upload model, checked by foxlm {foxlm.__version__}"
            # A list of its own for each call: the Hub's client adds to it.
            ignored = list(OF_TRAINING)
            hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=ignored)
    except Exception as error:  # of the Hub's client, of its HTTP library, of the network
        raise RuntimeError(f"pushing to {repo_id} failed: {error}") from error
    if public:
        raise ValueError(f"{repo_id} is there already and is public: choose another name, or make it private first")
    return f"https://huggingface.co/{repo_id}"
