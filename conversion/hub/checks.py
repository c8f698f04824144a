"""Checks of a model's folder before it is published. Each returns what it found, or raises a `ValueError`."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from transformers import AutoTokenizer

from foxlm.conversion.checkpoint_io import WEIGHTS_INDEX, StoredWeights, check_sizes
from foxlm.conversion.fox_folder import TASKS, architecture_of, read_config
from foxlm.conversion.hub.foreign_code import foreign_code
from foxlm.conversion.hub.model_card import MISSING, check_license
from foxlm.conversion.hub.secret_scan import secret_in, secret_rules
from foxlm.conversion.hub.unsafe_content import what_runs
from foxlm.conversion.hub.uploaded_files import left_out, refused_by_the_hub, uploaded_files
from foxlm.conversion.links import is_inside
from foxlm.conversion.new_folder import TEXT_FILES
from foxlm.conversion.weight_map import Plan, distinct_weights, few
from foxlm.modeling import modeling_fox
from foxlm.modeling.model_files import read_fields
from foxlm.modeling.remote_code import AUTO_MAP, exported_files, stale_files

_EXPECTED = (
    "config.json",
    "*.safetensors",
    WEIGHTS_INDEX,
    *TEXT_FILES,
    "README.md",
    ".gitattributes",
    *(f"*.{kind}" for kind in ("png", "jpg", "jpeg", "svg", "gif", "webp")),
)
# Other suffixes could be programs or web pages.
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE)[^.]*(\.(md|txt))?", re.IGNORECASE)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}


def check_configuration(folder: Path, allowed: Collection[str] = ()) -> str:
    """A valid configuration of a FoX class."""
    return architecture_of(read_config(folder))


def check_weights(folder: Path, allowed: Collection[str] = ()) -> str:
    """The files named by the index hold exactly the weights of the model, with its shapes, all finite."""
    config, stored = read_config(folder), StoredWeights(folder)
    check_sizes(read_fields(folder), stored.headers)
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
    return f"{len(headers)} weights, {count:,} parameters, {' and '.join(dtypes)}, all finite"


def check_tokenizer(folder: Path, allowed: Collection[str] = ()) -> str:
    """A tokenizer whose tokens the model knows, and that needs no code but what is allowed."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError("there is none: save it beside the model, tokenizer.save_pretrained(folder)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(allowed))
    except Exception as error:  # whatever a tokenizer's own library raises
        raise ValueError(f"it cannot be loaded: {error}") from error
    vocab_size = read_config(folder).vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise ValueError(f"its tokens must be below the model's vocab_size of {vocab_size}, got {largest}")
    return f"{type(tokenizer).__name__}, {largest + 1:,} tokens of {vocab_size:,}"


def check_code(folder: Path, allowed: Collection[str] = ()) -> str:
    """The model's code as this version of foxlm writes it, and no other but what is allowed."""
    renew = f"foxlm export-code {folder} writes them anew"
    own, files = exported_files(), uploaded_files(folder)
    # A directory or an unreadable name is as wrong as another text.
    wrong = [
        name for name in own if not (folder / name).is_file() or (folder / name).read_bytes() != own[name].encode()
    ]
    _none(f"files are missing or are not those of this version ({renew})", wrong)
    _none(f"files are left over from another version ({renew})", stale_files(folder))
    auto_map = read_fields(folder).get("auto_map") or {}
    _none(
        f"entries of auto_map in config.json are wrong ({renew})",
        [x for x in AUTO_MAP if auto_map.get(x) != AUTO_MAP[x]],
    )
    _none("--allow-code names what is not there", [x for x in allowed if "--" not in x and x not in files])
    _none(
        "code is not foxlm's own (move it elsewhere, or name it by --allow-code once you have read it)",
        foreign_code(files, allowed),
    )
    templates = [name for name in files if name.endswith(".jinja")]
    also = [*allowed, *(f"{name} (a template, which transformers runs in a sandbox)" for name in templates)]
    return f"{len(own)} files, {sum(map(len, own.values())) / 1e3:.0f} kB" + "".join(f"; {name}" for name in also)


def check_files(folder: Path, allowed: Collection[str] = ()) -> str:
    """Nothing that a model does not need, that lies elsewhere, or that the Hub would refuse, but what is left out."""
    files = uploaded_files(folder)
    _none(
        "files are links that leave the folder, or lead nowhere", [x for x in files if not is_inside(files[x], folder)]
    )
    unexpected = [
        name
        for name in files
        if "/" in name or not (any(Path(name).match(x) for x in _EXPECTED) or _LEGAL.fullmatch(name))
    ]
    _none("files are none of a model's (move them elsewhere)", {*unexpected} - exported_files().keys() - {*allowed})
    _none("the Hub cannot take", refused_by_the_hub(files))
    size = sum(path.stat().st_size for path in files.values()) / 1e6
    others = left_out(folder)
    return f"{len(files)} files, {size:,.1f} MB" + (f"; left out, as of training: {few(others)}" if others else "")


def check_contents(folder: Path, allowed: Collection[str] = ()) -> str:
    """No file that may run code when it is opened, by what it holds or by what its name says."""
    files = {name: path for name, path in uploaded_files(folder).items() if path.is_file()}
    named = {name: "a pickle by its name" for name in files if Path(name).suffix.lower() in _PICKLES}
    found = {name: reason for name, path in files.items() if name not in allowed and (reason := what_runs(path))}
    _none(
        "files may run code when they are opened (move them elsewhere)",
        [f"{name} ({reason})" for name, reason in (named | found).items()],
    )
    return "no pickles, archives, programs or active drawings"


def check_secrets(folder: Path, allowed: Collection[str] = ()) -> str:
    """No passwords, tokens or keys, in any file."""
    rules = secret_rules()
    files = {
        name: path for name, path in uploaded_files(folder).items() if path.is_file() and name not in exported_files()
    }
    _none(
        "files hold what looks like a password or key",
        [f"{name} ({kind})" for name, path in files.items() if (kind := secret_in(path, rules))],
    )
    return f"none of {len(rules)} kinds in {len(files)} files"


def check_card(folder: Path, allowed: Collection[str] = ()) -> str:
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
    check_license(license)
    for field in ("base_model", "datasets"):
        given = card.data.get(field) or []
        names = given if isinstance(given, list) else [given]
        _none(f"{field} in README.md must be names on the Hub, got", [repr(x) for x in names if not _is_hub_name(x)])
    lines = [f"line {number}" for number, line in enumerate(card.content.splitlines(), 1) if MISSING in line]
    _none(f"README.md still has {MISSING}", lines)
    if "trust_remote_code=True" not in card.text:
        raise ValueError("README.md must say how to load the model: trust_remote_code=True")
    return f"license {license}"


def check_loading(folder: Path, allowed: Collection[str] = ()) -> str:
    """The same logits in a fresh process with foxlm, and in one where only the folder's own code can be imported."""
    auto_class = TASKS[architecture_of(read_config(folder))][0]
    program = Path(__file__).with_name("fresh_process.py").read_text(encoding="utf-8")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1"}
        for source in ("foxlm", "folder"):
            out = Path(scratch) / f"{source}.safetensors"
            trust = "tokenizer" if allowed else ""
            command = [sys.executable, "-c", program, str(folder.resolve()), str(out), auto_class, source, trust]
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


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def _none(what: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` that says what is wrong and names the first few, if there are any."""
    wrong = sorted(names)
    if wrong:
        raise ValueError(f"{what}: {few(wrong)}")
