"""Sources damaged or edited by hand: converting and grafting end in one line that names file or field."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from checkpoints import write, write_index
from fla_checkpoints import EVERYTHING, FLA_SIZES, fla_checkpoint
from foxlm.conversion.convert import convert_to_folder
from foxlm.conversion.graft import graft_to_folder
from fuzz import fuzz

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
READERS: dict[str, Callable[[Path, Path], None]] = {
    "fla": convert_to_folder,
    "fox": lambda source, out: convert_to_folder(source, out, to="fla"),
    "llama": graft_to_folder,
    "qwen3": graft_to_folder,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind that can be read."""
    folder = tmp_path_factory.mktemp("sources")
    write(folder / "fla", FLA_SIZES | EVERYTHING, fla_checkpoint(FLA_SIZES | EVERYTHING))
    convert_to_folder(folder / "fla", folder / "fox")
    LlamaForCausalLM(LlamaConfig(**BASE)).save_pretrained(folder / "llama")
    Qwen3ForCausalLM(Qwen3Config(**BASE, head_dim=16)).save_pretrained(folder / "qwen3")
    return folder


def read(source: Path, out: Path, kind: str) -> str | None:
    """Convert or graft; the one line of the error, if there is one, after which nothing is left."""
    before = {path: path.read_bytes() for path in source.iterdir()}
    try:
        READERS[kind](source, out)
    except (ValueError, OSError) as error:
        assert not out.exists() and sorted(out.parent.iterdir()) == [source]
        assert len(str(error).splitlines()) == 1, str(error)
        return str(error)
    finally:
        assert before == {path: path.read_bytes() for path in source.iterdir()}
    shutil.rmtree(out)
    return None


def test_control_whole_sources_are_read(whole: Path, tmp_path: Path) -> None:
    for kind in READERS:
        assert read(Path(shutil.copytree(whole / kind, tmp_path / kind)), tmp_path / "out", kind) is None
        shutil.rmtree(tmp_path / kind)


# What flash-linear-attention calls fields that have another name.
THEIRS = {"num_attention_heads": "num_heads", "rms_norm_eps": "norm_eps"}


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


CONFIGS: dict[str, tuple[Any, str]] = {
    "size in words": ({"hidden_size": "many"}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be|config.json does not describe"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000, but its files"),
    "very many layers": ({"num_hidden_layers": 1e30}, "num_hidden_layers in config.json is 1e\\+30"),
    "a billion heads": ({"num_attention_heads": 10**9}, "heads in config.json is 1000000000"),
    "a billion tokens": ({"vocab_size": 10**9}, "vocab_size in config.json is 1000000000"),
    "a billion labels": ({"num_labels": 10**9}, "num_labels in .*config.json must be at most"),
    "labels": ({"id2label": {"a": 1}}, "id2label in .*config.json must be"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
    "type of number": ({"dtype": "float99"}, "float99"),
    "model type": ({"model_type": ["llama"]}, "model_type must be"),
    "unknown model type": ({"model_type": "mamba99"}, "model_type must be.*mamba99"),
    "no model type": ({"model_type": None}, "model_type must be.*None"),
    "list for auto_map": ({"auto_map": ["a.B"]}, r"auto_map in .*config.json must be an object, got \['a.B'\]"),
    "number for auto_map": ({"auto_map": 3}, "auto_map in .*config.json must be an object, got 3"),
    "list for RoPE": ({"rope_parameters": [1]}, "rope_parameters|config.json"),
    "deep": (deep(100_000), "config.json is not valid JSON"),
    "deep field": ('{"model_type": ' + deep(5_000) + "}", "config.json is not valid JSON|model_type must be"),
    "list": ("[]", "config.json must hold a JSON object"),
    "nothing": ("", "config.json is not valid JSON"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_edited_by_hand_is_named(whole: Path, tmp_path: Path, kind: str, case: str) -> None:
    source = Path(shutil.copytree(whole / kind, tmp_path / kind))
    change, message = CONFIGS[case]
    if kind == "fla" and isinstance(change, dict):
        change = {THEIRS.get(name, name): value for name, value in change.items()}
    text = change if isinstance(change, str) else json.dumps(json.loads((source / "config.json").read_text()) | change)
    (source / "config.json").write_text(text)
    found = read(source, tmp_path / "out", kind)
    if kind in ("fla", "fox") and case in ("type of number", "list for RoPE") and found is None:
        return  # types are those of the weights, and what RoPE there is does not count without it
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def large_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1 << 62) + file.read_bytes()[8:])


def pointer(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n" * 9)


def broken_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20] + b"\xff\xfe{{" + file.read_bytes()[24:])


def offsets(file: Path) -> None:
    """Tensors that overlap."""
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 12)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("spoil", [shortened, empty, large_header, pointer, broken_header, offsets])
def test_broken_weights_are_named(whole: Path, tmp_path: Path, kind: str, spoil: Callable[[Path], None]) -> None:
    source = Path(shutil.copytree(whole / kind, tmp_path / kind))
    file = min(source.glob("*.safetensors"))
    spoil(file)
    assert f"{file.name} is not a whole safetensors file" in str(read(source, tmp_path / "out", kind))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("gone.safetensors", "lists 'gone.safetensors', which is not a file"),
        ("../outside.safetensors", "lists '../outside.safetensors', which is not a file"),
        ("/etc/passwd", "lists '/etc/passwd', which is not a file"),
        ("config.json", "lists 'config.json', which is not a file"),
        (3, "must have a weight_map from weights to files"),
    ],
)
def test_index_that_points_elsewhere_is_named(whole: Path, tmp_path: Path, named: object, message: str) -> None:
    source = Path(shutil.copytree(whole / "llama", tmp_path / "llama"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    save_file(weights, source / "model-1.safetensors")
    index = write_index(source)
    assert read(source, tmp_path / "out", "llama") is None
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = named
    index.write_text(json.dumps(content))
    assert message in str(read(source, tmp_path / "out", "llama"))


VALUES: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**9, 10**30, 1e30, float("nan"), "", "x", [], [1], {}, {"a": 1})
FIELDS = ("auto_map", "dtype", "rope_parameters", "rope_scaling", "quantization_config", "layer_types", "id2label")


@pytest.mark.fuzz
def test_any_source_is_read_or_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        kind = rng.choice([*READERS])
        source = Path(shutil.copytree(whole / kind, tmp_path / kind))
        try:
            if rng.random() < 0.8:
                fields = json.loads((source / "config.json").read_text())
                for _ in range(rng.randint(1, 2)):
                    fields[rng.choice(sorted({*fields, *FIELDS}))] = rng.choice(VALUES)
                (source / "config.json").write_text(json.dumps(fields))
            else:
                file = rng.choice(sorted(source.glob("*.safetensors")))
                content = bytearray(file.read_bytes())
                start = rng.randrange(min(len(content), rng.choice([8, 400, len(content)])))
                content[start : start + rng.randint(0, 9)] = rng.randbytes(rng.randint(0, 9))
                file.write_bytes(content)
            read(source, tmp_path / "out", kind)
        finally:
            shutil.rmtree(source)

    fuzz(case)
