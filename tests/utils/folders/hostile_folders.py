"""Models' folders as an accident, an editor or a malicious author may leave them."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import write
from fla_checkpoints import EVERYTHING, FLA_SIZES, fla_checkpoint
from foxlm import FoxConfig, FoxForCausalLM
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from hostile_values import any_value

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 256,
}
OF_FOX: dict[str, Any] = {"architectures": ["FoxForCausalLM"], "qk_norm_eps": 1e-5}


def fox_folder(folder: Path) -> None:
    """A valid FoX model with a tokenizer of bytes, and without its code."""
    torch.manual_seed(0)
    FoxForCausalLM(FoxConfig(**SIZES, **OF_FOX)).save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    byte_tokenizer().save_pretrained(folder)


def llama_folder(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)


def fla_folder(folder: Path) -> None:
    """A checkpoint of flash-linear-attention."""
    folder.mkdir()
    fields = FLA_SIZES | EVERYTHING
    write(folder, fields, fla_checkpoint(fields))


def edit(folder: Path, **changes: Any) -> None:
    """Give fields of ``config.json`` other values."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _cut(folder: Path, part: float) -> None:
    content = _weights(folder).read_bytes()
    _weights(folder).write_bytes(content[: int(part * len(content))])


def _write_config(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_bytes(content)


def _fields(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name if name != WEIGHTS else _weights(folder)
        path.unlink()
        make(path)

    return change


def _without_a_weight(folder: Path) -> None:
    weights = load_file(_weights(folder))
    del weights[max(weights)]
    save_file(weights, _weights(folder), metadata={"format": "pt"})


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _loop_of_folders(folder: Path) -> None:
    _no_folder(folder)
    folder.symlink_to(folder)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _index(content: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
        _weights(folder).unlink()

    return change


# By name what is done to a valid folder, and what the message must name: a file or a field.
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda folder: _cut(folder, 0.6), "safetensors"),
    "truncated header of weights": (lambda folder: _cut(folder, 0.01), "safetensors"),
    "empty weights": (lambda folder: _cut(folder, 0.0), "safetensors"),
    "weights with an endless header": (lambda folder: _weights(folder).write_bytes(b"\xff" * 64), "safetensors"),
    "weights are a folder": (_instead(WEIGHTS, Path.mkdir), ""),
    "weights are a loop": (_instead(WEIGHTS, _loop), ""),
    "a weight is missing": (_without_a_weight, ""),
    "an index of nothing": (_index({"weight_map": {}}), ""),
    "an index of other folders": (_index({"weight_map": {"lm_head.weight": "../../etc/passwd"}}), ""),
    "an index that is a list": (_index([1]), ""),
    "config is empty": (_write_config(b""), CONFIG),
    "config is not JSON": (_write_config(b'{"model_type": '), CONFIG),
    "config is not UTF-8": (_write_config(b'{"model_type": "f\xff"}'), CONFIG),
    "config is nested deeply": (_write_config(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), CONFIG),
    "config is a list": (_write_config(b"[1]"), CONFIG),
    "config has a number of many digits": (_write_config(b'{"vocab_size": ' + b"9" * 5000 + b"}"), CONFIG),
    "config is a folder": (_instead(CONFIG, Path.mkdir), ""),
    "config is a loop": (_instead(CONFIG, _loop), ""),
    "config is gone": (lambda folder: (folder / CONFIG).unlink(), ""),
    "the folder is gone": (_no_folder, ""),
    "the folder is a loop": (_loop_of_folders, ""),
    "no model type": (_fields(model_type=None), "model_type"),
    "unknown model type": (_fields(model_type="wolf"), ""),
    "model type of another type": (_fields(model_type=["fox"]), "model_type"),
    "auto_map is a number": (_fields(auto_map=7), "auto_map"),
    "auto_map is a list": (_fields(auto_map=["AutoConfig"]), "auto_map"),
    "auto_map holds numbers": (_fields(auto_map={"AutoConfig": 7}), "auto_map"),
    "layers are text": (_fields(num_hidden_layers="two"), "num_hidden_layers"),
    "layers are a fraction": (_fields(num_hidden_layers=1e30), "num_hidden_layers"),
    "a billion layers": (_fields(num_hidden_layers=10**9), "num_hidden_layers"),
    "no heads": (_fields(num_attention_heads=0), "num_attention_heads"),
    "negative heads": (_fields(num_attention_heads=-2), "num_attention_heads"),
    "a wide model": (_fields(hidden_size=10**15), "hidden_size"),
    "many words": (_fields(vocab_size=10**18), "vocab_size"),
    "no width": (_fields(hidden_size=0), "hidden_size"),
    "another width": (_fields(hidden_size=32), ""),
    "unknown dtype": (_fields(dtype="float99"), "dtype"),
    "dtype is a number": (_fields(dtype=3), "dtype"),
    "a NaN": (_fields(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "an infinity": (_fields(initializer_range=float("inf")), "initializer_range"),
}


def edit_json(path: Path, rng: random.Random) -> None:
    """Change, remove or repeat one entry, at any depth."""
    content: Any = json.loads(path.read_text())
    inside: Any = content
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} has no entry")
    while True:
        key: Any = rng.choice(sorted(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
        if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.3:
            break
        inside = inside[key]
    action = rng.random()
    if action < 0.2:
        del inside[key]
    elif action < 0.3 and isinstance(inside, dict):
        inside[key + rng.choice(["s", "_", "2"])] = inside[key]
    else:
        inside[key] = any_value(rng)
    path.write_text(json.dumps(content))


def _spoil(path: Path, rng: random.Random) -> None:
    """Cut, repeat, or change bytes."""
    content = bytearray(path.read_bytes())
    where = rng.randrange(len(content) + 1)
    action = rng.randrange(4)
    if action == 0:
        del content[where:]
    elif action == 1:
        content[where:where] = content[: rng.randrange(64)]
    elif action == 2:
        content[where:] = content[where + rng.randrange(64) :]
    else:
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(min(len(content), rng.choice([16, 10**9])))] = rng.randrange(256)
    path.write_bytes(content)


def mutate(folder: Path, rng: random.Random) -> None:
    """One or two random changes of a valid folder."""
    for _ in range(rng.choice([1, 1, 2])):
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)
        path = rng.choice([file for file in files if file.name == CONFIG] or files)
        if rng.random() < 0.5:
            path = rng.choice(files)
        action = rng.random()
        if path.suffix == ".json" and action < 0.7:
            try:
                edit_json(path, rng)
            except ValueError:
                # Spoiled by the first change.
                _spoil(path, rng)
        elif action < 0.9:
            _spoil(path, rng)
        else:
            path.unlink()
            instead: list[Callable[[Path], object]] = [
                Path.mkdir,
                _loop,
                lambda path: path.symlink_to("/dev/null"),
                str,
            ]
            rng.choice(instead)(path)


def make_unreadable(folder: Path) -> bool:
    """Take away the right to read ``config.json``; False where that stops nobody."""
    (folder / CONFIG).chmod(0)
    return not os.access(folder / CONFIG, os.R_OK)
