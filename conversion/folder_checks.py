"""What a model's folder must be before others get it. Each check returns what it found, or raises a `ValueError`."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from foxlm.conversion.fox_folder import TASKS, architecture_of, read_config
from foxlm.conversion.model_card import MISSING
from foxlm.conversion.new_folder import TEXT_FILES
from foxlm.conversion.stored_weights import WEIGHTS_INDEX, StoredWeights, read_fields
from foxlm.conversion.weight_map import Plan, distinct_weights, few
from foxlm.modeling import modeling_fox
from foxlm.modeling.bundle_fox import AUTO_MAP, bundle, stale_files

_EXPECTED = (
    "config.json",
    "*.safetensors",
    WEIGHTS_INDEX,
    *TEXT_FILES,
    "README.md",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
    *(f"*.{kind}" for kind in ("png", "jpg", "jpeg", "svg", "gif", "webp")),
)
# The Hub's client leaves these out of what it uploads.
_NOT_UPLOADED = (".git", ".cache")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
# How files of `pickle` (protocols 2 to 5) and of `torch.save` begin, whatever their name.
_PICKLE_BEGINNINGS = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04")
_SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def check_configuration(folder: Path) -> str:
    """A valid configuration of one of our classes."""
    return architecture_of(read_config(folder))


def check_weights(folder: Path) -> str:
    """Every weight of the model, no others, of its shape, finite; in the files that the index names."""
    config, stored = read_config(folder), StoredWeights(folder)
    named = set(stored.files.values()) if (folder / WEIGHTS_INDEX).is_file() else {folder / "model.safetensors"}
    others = named ^ set(folder.glob("*.safetensors"))
    _none("files of weights that are missing, or that nothing names", [file.name for file in others])
    with torch.device("meta"):
        model = getattr(modeling_fox, architecture_of(config))(config)
    Plan(reads={name: weight.shape for name, weight in distinct_weights(model).items()}).check(
        stored.headers, stored.load
    )
    _none(
        "weights that are not all finite numbers",
        [f"{name} in {file.name}" for name, file in stored.files.items() if not stored.load(name).isfinite().all()],
    )
    headers = stored.headers.values()
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in headers})
    count = sum(weight.numel() for weight in headers)
    return f"{len(headers)} weights, {count:,} numbers, {' and '.join(dtypes)}, all finite"


def check_tokenizer(folder: Path) -> str:
    """A tokenizer that needs no code of its own and whose tokens the model knows."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError("there is none: save it beside the model, tokenizer.save_pretrained(folder)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own library raises
        raise ValueError(f"it cannot be loaded: {error}") from error
    vocab_size = read_config(folder).vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise ValueError(f"its tokens must be below the model's vocab_size of {vocab_size}, got {largest}")
    return f"{type(tokenizer).__name__}, {largest + 1:,} tokens of {vocab_size:,}"


def check_code(folder: Path) -> str:
    """The model's code as this version of foxlm writes it."""
    renew = f"foxlm bundle {folder} writes them anew"
    files = bundle()
    # A directory or an unreadable name is as wrong as another text.
    wrong = [
        name for name in files if not (folder / name).is_file() or (folder / name).read_bytes() != files[name].encode()
    ]
    _none(f"files are missing or are not those of this version ({renew})", wrong)
    _none(f"files are left over from another version ({renew})", stale_files(folder))
    auto_map = read_fields(folder).get("auto_map") or {}
    _none(
        f"entries of auto_map in config.json are wrong ({renew})",
        [x for x in AUTO_MAP if auto_map.get(x) != AUTO_MAP[x]],
    )
    return f"{len(files)} files, {sum(map(len, files.values())) / 1e3:.0f} kB"


def check_files(folder: Path) -> str:
    """No pickles, no secrets, nothing that a model does not need."""
    files = [path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] not in _NOT_UPLOADED]
    pickles, secrets, unexpected = [], [], []
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file():
            unexpected.append(name)
            continue
        with path.open("rb") as content:
            beginning = content.read(4)
        if path.suffix in _PICKLES or beginning.startswith(_PICKLE_BEGINNINGS):
            pickles.append(name)
        elif path.suffix != ".safetensors" and _SECRETS.search(path.read_bytes()):
            secrets.append(name)
        elif not any(Path(name).match(pattern) for pattern in _EXPECTED) or "/" in name:
            unexpected.append(name)
    _none("files may be pickles, which run code when they are loaded (move them elsewhere)", pickles)
    _none("files hold what looks like a password or key", secrets)
    _none("files are none of a model's (move them elsewhere)", sorted(set(unexpected) - bundle().keys()))
    size = sum(path.stat().st_size for path in files if path.is_file())
    return f"{sum(path.is_file() for path in files)} files, {size / 1e6:,.1f} MB"


def check_card(folder: Path) -> str:
    """A card that says what the Hub and a reader need, with nothing left to fill in."""
    file = folder / "README.md"
    if not file.is_file():
        raise ValueError(f"there is no README.md: foxlm card {folder} writes one")
    try:
        card = ModelCard.load(file)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the first lines of README.md must be valid YAML: {error}") from error
    wanted = ["license", "library_name", "pipeline_tag"]
    if card.data.get("license") == "other":
        wanted += ["license_name", "license_link"]
    _none("the first lines of README.md must give", [name for name in wanted if not card.data.get(name)])
    license = str(card.data.license)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"license must be written as on the Hub, apache-2.0 for example, or other, got {license!r}")
    lines = [f"line {number}" for number, line in enumerate(card.content.splitlines(), 1) if MISSING in line]
    _none(f"README.md still has {MISSING}", lines)
    if "trust_remote_code=True" not in card.text:
        raise ValueError("README.md must say how to load the model: trust_remote_code=True")
    return f"license {license}"


def check_loading(folder: Path) -> str:
    """The same logits in a fresh process with foxlm, and in one where only the folder's own code can be imported."""
    auto_class = TASKS[architecture_of(read_config(folder))][0]
    program = Path(__file__).with_name("fresh_process.py").read_text(encoding="utf-8")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        for source in ("foxlm", "folder"):
            out = Path(scratch) / f"{source}.safetensors"
            command = [sys.executable, "-c", program, str(folder.resolve()), str(out), auto_class, source]
            done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ValueError(f"with the code of {'the folder' if source == 'folder' else source}: {last}")
            results[source] = load_file(out)
    first, second = results.values()
    _none("results differ between foxlm and the folder's own code", [x for x in first if not first[x].equal(second[x])])
    if not first["logits"].isfinite().all():
        raise ValueError("the model's logits are not finite")
    return "with foxlm and with the folder's own code; the same logits, bit for bit"


def _none(what: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` that says what is wrong and names the first few, if there are any."""
    wrong = sorted(names)
    if wrong:
        raise ValueError(f"{what}: {few(wrong)}")
