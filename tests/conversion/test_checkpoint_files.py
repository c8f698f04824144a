"""Files of converted checkpoints: read by shards, refused in one line where broken, written whole or not at all."""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from authors_checkpoints import authors_checkpoint
from checkpoints import converted, read, write, write_index
from foxlm import FoxForCausalLM
from foxlm.cli import app
from foxlm.conversion import convert
from foxlm.conversion.convert import convert_to_folder


@pytest.fixture
def theirs(tmp_path):
    fields, _, weights = authors_checkpoint("pro")
    write(tmp_path / "theirs", fields, weights)
    return tmp_path / "theirs"


def refused(source: Path, out: Path, *options: str) -> str:
    """What the command says to a conversion that it refuses, which leaves nothing."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    result = CliRunner().invoke(app, ["convert", str(source), str(out), *options])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
    return result.stderr


def test_shards(theirs, tmp_path, monkeypatch):
    write_index(theirs)
    expected = converted(theirs, tmp_path / "expected")
    monkeypatch.setattr(convert, "_SHARD_BYTES", 20_000)
    convert_to_folder(theirs, tmp_path / "ours")
    convert_to_folder(tmp_path / "ours", tmp_path / "back", to="authors")
    for folder in (tmp_path / "ours", tmp_path / "back"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 2
        listed = {name: file.name for file in shards for name in load_file(file)}
        assert index["weight_map"] == listed
        assert all(sum(weight.nbytes for weight in load_file(file).values()) <= 20_000 for file in shards)
        weights = read(folder)
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
        assert index["metadata"]["total_parameters"] == sum(weight.numel() for weight in weights.values())
    tokens = torch.randint(61, (2, 19))
    ours = FoxForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours(tokens).logits, expected(tokens).logits)
    original, back = read(theirs), read(tmp_path / "back")
    assert all(torch.equal(back[name], weight) for name, weight in original.items())


def test_one_shard_is_held_at_a_time(theirs, tmp_path, monkeypatch):
    saved: list[weakref.ref] = []
    written: list[Path] = []
    load, save = convert.StoredWeights.load, convert.save_file

    def watched_load(stored, name):
        assert all(weight() is None for weight in saved)
        return load(stored, name)

    def watched_save(weights, file, **kwargs):
        save(weights, file, **kwargs)
        saved.extend(weakref.ref(weight) for weight in weights.values())
        written.append(file)

    monkeypatch.setattr(convert, "_SHARD_BYTES", 20_000)
    monkeypatch.setattr(convert.StoredWeights, "load", watched_load)
    monkeypatch.setattr(convert, "save_file", watched_save)
    convert_to_folder(theirs, tmp_path / "ours")
    assert len(written) > 2 and len(saved) == len(read(tmp_path / "ours"))


def missing_shard(theirs):
    write_index(theirs)
    (theirs / "model-1.safetensors").unlink()
    return "lists 'model-1.safetensors', which is not a file *.safetensors of the folder"


def file_elsewhere(theirs):
    index = write_index(theirs)
    shutil.move(theirs / "model-1.safetensors", theirs.parent / "model-1.safetensors")
    index.write_text(index.read_text().replace("model-1", "../model-1"))
    return "lists '../model-1.safetensors', which is not a file *.safetensors of the folder"


def pickle_in_an_index_of_safetensors(theirs):
    index = write_index(theirs)
    torch.save(load_file(theirs / "model-1.safetensors"), theirs / "model-1.bin")
    index.write_text(index.read_text().replace("model-1.safetensors", "model-1.bin"))
    return "lists 'model-1.bin', which is not a file *.safetensors of the folder"


def key_that_a_shard_lacks(theirs):
    write_index(theirs)
    file = theirs / "model-0.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file)
    return "model.norm.weight is in none of its files"


def key_that_the_index_lacks(theirs):
    index = write_index(theirs)
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    return "index.json says nothing"


def key_in_two_shards(theirs):
    file = theirs / "model-1.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(32)}, file)
    return "model.norm.weight is in two files"


def index_without_map(theirs):
    write_index(theirs).write_text('{"metadata": {}}')
    return "must have a weight_map"


def index_beside_a_whole_file(theirs):
    write_index(theirs)
    shutil.copy(theirs / "model-0.safetensors", theirs / "model.safetensors")
    return "holds both model.safetensors and model.safetensors.index.json"


def truncated_shard(theirs):
    file = theirs / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    return "model-1.safetensors is not a whole safetensors file"


def empty_shard(theirs):
    (theirs / "model-1.safetensors").write_bytes(b"")
    return "model-1.safetensors is not a whole safetensors file"


def broken_header(theirs):
    file = theirs / "model-1.safetensors"
    content = bytearray(file.read_bytes())
    content[20:24] = b"\xff\xfe{{"
    file.write_bytes(content)
    return "model-1.safetensors is not a whole safetensors file"


def huge_header(theirs):
    file = theirs / "model-1.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 62) + file.read_bytes()[8:])
    return "model-1.safetensors is not a whole safetensors file"


def other_bytes(theirs):
    (theirs / "model-1.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n" * 9)
    return "model-1.safetensors is not a whole safetensors file"


def integers(theirs):
    file = theirs / "model-0.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, file)
    return "model.norm.weight must be one of float64, float32, bfloat16, float16, got torch.int8"


def eight_bits(theirs):
    file = theirs / "model-1.safetensors"
    save_file({name: weight.to(torch.float8_e4m3fn) for name, weight in load_file(file).items()}, file)
    return "got torch.float8_e4m3fn"


def no_json(theirs):
    (theirs / "config.json").write_text("{'model_type': 1")
    return "config.json is not valid JSON"


def deep_json(theirs):
    (theirs / "config.json").write_text("[" * 100_000)
    return "config.json is not valid JSON"


def json_list(theirs):
    (theirs / "config.json").write_text("[1]")
    return "config.json must hold a JSON object, got a list"


def latin_json(theirs):
    (theirs / "config.json").write_bytes(b'{"model_type": "\xe9"}')
    return "config.json is not valid JSON"


def sizes_as_text(theirs):
    fields = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(fields | {"num_heads": "four"}))
    return "num_attention_heads must be int, got 'four'"


def no_heads(theirs):
    fields = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(fields | {"num_heads": 0}))
    return "num_attention_heads must be a positive integer"


def list_as_type(theirs):
    (theirs / "config.json").write_text('{"model_type": ["fox"]}')
    return "model_type must be one of"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_shard,
        file_elsewhere,
        pickle_in_an_index_of_safetensors,
        key_that_a_shard_lacks,
        key_that_the_index_lacks,
        key_in_two_shards,
        index_without_map,
        index_beside_a_whole_file,
        truncated_shard,
        empty_shard,
        broken_header,
        huge_header,
        other_bytes,
        integers,
        eight_bits,
        no_json,
        deep_json,
        json_list,
        latin_json,
        sizes_as_text,
        no_heads,
        list_as_type,
    ],
)
def test_broken_source_is_refused_in_one_line(spoil, theirs, tmp_path):
    message = spoil(theirs)
    assert message in refused(theirs, tmp_path / "ours")


def test_source_that_is_a_file(theirs, tmp_path):
    assert "must be a folder with a config.json" in refused(theirs / "config.json", tmp_path / "ours")


@pytest.mark.parametrize("there", ["file", "folder", "dangling link"])
def test_out_that_is_there_is_refused(there, theirs, tmp_path):
    out = tmp_path / "ours"
    {"file": out.touch, "folder": out.mkdir, "dangling link": lambda: out.symlink_to("nowhere")}[there]()
    assert "which is there already" in refused(theirs, out)


def test_out_in_places_where_none_can_be(theirs, tmp_path):
    assert "must not lie in the source" in refused(theirs, theirs / "ours")
    (tmp_path / "link").symlink_to(theirs)
    assert "must not lie in the source" in refused(theirs, tmp_path / "link" / "new" / "ours")
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in refused(theirs, tmp_path / "file" / "ours")
    (tmp_path / "locked").mkdir(mode=0o500)
    if not os.access(tmp_path / "locked", os.W_OK):
        assert "Permission denied" in refused(theirs, tmp_path / "locked" / "ours")


def test_direction_must_fit_the_source(theirs, tmp_path):
    assert "to must be one of ['fox', 'authors', 'fla'], got 'llama'" in refused(
        theirs, tmp_path / "o", "--to", "llama"
    )
    assert "model_type must be 'fox'" in refused(theirs, tmp_path / "o", "--to", "authors")
    convert_to_folder(theirs, tmp_path / "ours")
    assert "got 'fox'" in refused(tmp_path / "ours", tmp_path / "o")


def test_types_may_be_mixed_and_numbers_anything(theirs, tmp_path):
    file = theirs / "model-0.safetensors"
    odd = torch.full((32,), float("nan"), dtype=torch.float16)
    save_file(load_file(file) | {"model.norm.weight": odd}, file)
    convert_to_folder(theirs, tmp_path / "ours")
    weights = read(tmp_path / "ours")
    assert weights["model.norm.weight"].dtype == torch.float16 and weights["model.norm.weight"].isnan().all()
    assert weights["model.embed_tokens.weight"].dtype == torch.float32
    assert FoxForCausalLM.from_pretrained(tmp_path / "ours").model.norm.weight.dtype == torch.float32


def pickled(theirs: Path, shards: bool = False) -> dict[str, torch.Tensor]:
    weights = read(theirs)
    names = sorted(weights)
    files = {"pytorch_model.bin": names}
    if shards:
        files = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
        listed = {name: file for file, some in files.items() for name in some}
        (theirs / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    for file, some in files.items():
        torch.save({name: torch.nn.Parameter(weights[name]) for name in some}, theirs / file)
    for safe in theirs.glob("*.safetensors"):
        safe.unlink()
    return weights


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_are_read_only_where_asked_for(shards, theirs, tmp_path):
    convert_to_folder(theirs, tmp_path / "expected")
    pickled(theirs, shards)
    assert "--allow-pickle" in refused(theirs, tmp_path / "ours")
    with pytest.raises(ValueError, match="allow_pickle"):
        convert_to_folder(theirs, tmp_path / "ours")
    result = CliRunner().invoke(app, ["convert", "--allow-pickle", str(theirs), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    ours, expected = read(tmp_path / "ours"), read(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_pickle_that_runs_code_does_not(theirs, tmp_path):
    weights, harm = pickled(theirs), tmp_path / "harm"
    file = theirs / "pytorch_model.bin"
    torch.save(weights | {"model.norm.weight": Malicious(harm)}, file)
    assert "pytorch_model.bin is not a whole file of pickled weights" in refused(
        theirs, tmp_path / "o", "--allow-pickle"
    )
    assert not harm.exists()
    torch.load(file, weights_only=False)
    assert harm.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "is not a whole file of pickled weights"),
        (b"", "is not a whole file of pickled weights"),
        (pickle.dumps({"model.norm.weight": [1.0]}), "is not a whole file of pickled weights"),
        ([torch.ones(3)], "must hold a dictionary of weights, got a list"),
        ({"model": {"model.norm.weight": torch.ones(32)}}, "must hold a dictionary of weights, got a dict as 'model'"),
        ({"model.norm.weight": torch.eye(3).to_sparse()}, "must hold a dictionary of weights"),
        ({3: torch.ones(3)}, "must hold a dictionary of weights, got a Tensor as 3"),
    ],
)
def test_pickle_of_something_else(content, message, theirs, tmp_path):
    pickled(theirs)
    file = theirs / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert message in refused(theirs, tmp_path / "ours", "--allow-pickle")


def test_pickled_weights_may_share_memory_and_have_strides(theirs, tmp_path):
    weights = pickled(theirs)
    weights["lm_head.weight"] = weights["model.embeddings.weight"]
    name = "model.layers.0.attn.q_proj.weight"
    weights[name] = weights[name].T.contiguous().T
    torch.save(weights, theirs / "pytorch_model.bin")
    convert_to_folder(theirs, tmp_path / "ours", allow_pickle=True)
    ours = read(tmp_path / "ours")
    assert torch.equal(ours["lm_head.weight"], weights["model.embeddings.weight"])
    assert torch.equal(ours["model.layers.0.self_attn.q_proj.weight"], weights[name])


@pytest.mark.parametrize("limit", [50, 30_000])
def test_full_disk_leaves_nothing(limit, theirs, tmp_path):
    # A limit on the size of files fails as a full disk does, in Python and in safetensors.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert "File too large" in refused(theirs, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    convert_to_folder(theirs, tmp_path / "ours")


def test_interruption_leaves_nothing(theirs, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_to_folder(theirs, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


KILLED = """
import os, signal, sys
from foxlm.conversion import convert
save, convert._SHARD_BYTES = convert.save_file, 20_000
def killed(weights, file, **kwargs):
    save(weights, file, **kwargs)
    if "00002" in file.name[:11]:
        os.kill(os.getpid(), signal.SIGKILL)
convert.save_file = killed
convert.convert_to_folder(sys.argv[1], sys.argv[2])
"""


def test_killed_in_the_middle_leaves_no_folder_that_looks_whole(theirs, tmp_path):
    out = tmp_path / "new" / "ours"
    done = subprocess.run([sys.executable, "-c", KILLED, theirs, out], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert all(path.name.startswith(".ours-") for path in out.parent.iterdir())
    # The negative control: two shards were written, and a second attempt succeeds.
    assert len(list(out.parent.glob(".ours-*/ours/model-*.safetensors"))) == 2
    convert_to_folder(theirs, out)
    FoxForCausalLM.from_pretrained(out)
