"""Malicious and careless folders: each is refused by name before publishing, and ordinary ones pass."""

import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import string
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from checkpoints import write
from foxlm.cli import app
from foxlm.conversion.convert import convert_to_folder
from foxlm.conversion.graft import graft_to_folder
from foxlm.conversion.hub import checks as folder_checks
from foxlm.conversion.hub import secret_scan
from foxlm.conversion.hub.checks import check_code, check_contents, check_files, check_secrets
from models import tiny_model

Spoil = Callable[[Path], object]


def put(name: str, content: bytes | str = b"x") -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def edit(name: str, **fields: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        nested = {key: content.get(key, {}) | value if key == "auto_map" else value for key, value in fields.items()}
        (folder / name).write_text(json.dumps(content | nested))

    return spoil


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


class Harm:
    """Unpickled, it calls a function."""

    def __reduce__(self):
        return os.getenv, ("HOME",)


class HarmInSteps:
    """As protocol 2 and later make an object, without a call of its own."""

    def __init__(self) -> None:
        self.a = 1


def as_zip(content: bytes, before: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", content)
    return before + file.getvalue()


def as_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("data.pkl"), io.BytesIO(content))
    return file.getvalue()


def as_torch(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, **options)
    return file.getvalue()


def as_npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Harm()], dtype=object), allow_pickle=True)
    return file.getvalue()


def safetensors_of(metadata: dict[str, str]) -> Spoil:
    return lambda folder: save_file({"a": torch.ones(2)}, folder / "other.safetensors", metadata=metadata)


def svg(inside: str, **attributes: str) -> str:
    given = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"{given}>{inside}</svg>'


HF = "hf_" + "aB3" * 12
# Made up here, piece by piece, so that no scanner takes this file for a leak.
SECRETS = {
    "of the Hub": HF,
    "of GitHub": "ghp_" + "a1B2" * 9,
    "of AWS": "AKIA" + "Q3" * 8,
    "of Slack": "xoxb-" + "123456789012-" * 2 + "a" * 24,
    "of Stripe": "sk_" + "live_" + "a1" * 12,
    "of OpenAI": "sk-" + "a1" * 10 + "T3BlbkFJ" + "b2" * 10,
    "of PyPI": "pypi-" + "AgEIcHlwaS5vcmc" + "a" * 70,
    "of GitHub, fine-grained": "github_pat_" + "11" + "a1B2" * 20,
    "of Anthropic": "sk-ant-" + "api03-" + "a1B2" * 24,
    "of Google": "AIza" + "a1B2c" * 7,
    "in a URL": "https://me:" + "hunter22" + "@example.org/x",
    "private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "older private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}
PICKLED = {f"pickle of protocol {n}": pickle.dumps(Harm(), protocol=n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
PICKLED |= {f"object of protocol {n}": pickle.dumps(HarmInSteps(), protocol=n) for n in (0, 1, 2, 4)}
PICKLED |= {
    "pickle that breaks off": pickle.dumps(Harm(), protocol=0)[:-1] + b"\xff",
    "pickle by hand": b"cos\nsystem\n(S'true'\ntR.",
    "pickle by INST": b"(S'true'\nios\nsystem\n.",
    "pickle after a large one": pickle.dumps((b"\0" * 100_000, Harm())),
    "data only": pickle.dumps({"a": 1}),
    "torch": as_torch(),
    "older torch": as_torch(_use_new_zipfile_serialization=False),
    "NumPy": as_npy(),
    "zip": as_zip(b"x"),
    "zip after an image": as_zip(b"x", before=b"\x89PNG\r\n\x1a\n" + b"\0" * 99),
    "gzip": gzip.compress(b"x"),
    "xz": lzma.compress(b"x"),
    "tar": as_tar(b"x"),
    "joblib": zlib.compress(pickle.dumps(Harm())),
    "7z": b"7z\xbc\xaf\x27\x1c\0\4",
}
DRAWN = {
    "script": svg("<script>alert(1)</script>"),
    "handler": svg("", onload="alert(1)"),
    "page inside": svg("<foreignObject/>"),
    "link": svg('<a xlink:href="javascript:alert(1)"><text>x</text></a>'),
    "image elsewhere": svg('<image href="https://example.org/x.png"/>'),
    "HTML as an image": svg('<image href="data:text/html,x"/>'),
    "style elsewhere": svg("<style>@import 'https://example.org/x.css';</style>"),
    "fill elsewhere": svg('<rect style="fill: url( https://example.org/x)"/>'),
    "entity": '<!DOCTYPE svg [<!ENTITY a "b">]>' + svg("&a;"),
    "style sheet": '<?xml-stylesheet href="x.css"?>' + svg(""),
    "animation": svg('<a><set attributeName="href" to="javascript:alert(1)"/></a>'),
    "style after an element": svg("<style><b/>@import 'https://example.org/x.css';</style>"),
    "set of images": svg("<style>*{fill: image-set('https://example.org/x.png' 1x)}</style>"),
    "page's element": svg('<meta xmlns="http://www.w3.org/1999/xhtml" http-equiv="refresh" content="0;url=//a"/>'),
    "broken": "<svg>",
}
REFERENCE = "mine.Mine"
CODE: dict[str, tuple[Spoil, str]] = {
    "tokenizer's code": (put("tokenizer_mine.py"), "tokenizer_mine.py"),
    "other code": (put("mine.py"), "mine.py"),
    "program": (put("tokenizer.so"), "tokenizer.so"),
    "generation loop": (put("custom_generate/generate.py"), "custom_generate/generate.py"),
    "tokenizer's auto_map": (edit("tokenizer_config.json", auto_map={"AutoTokenizer": [REFERENCE, None]}), REFERENCE),
    "its older form": (put("tokenizer_config.json", json.dumps({"auto_map": [REFERENCE, None]})), REFERENCE),
    "processor's auto_map": (edit("processor_config.json", auto_map={"AutoProcessor": REFERENCE}), REFERENCE),
    "preprocessor's": (edit("preprocessor_config.json", auto_map={"AutoImageProcessor": REFERENCE}), REFERENCE),
    "generation's": (edit("generation_config.json", auto_map={"GenerationConfig": REFERENCE}), REFERENCE),
    "adapter's": (edit("adapter_config.json", auto_mapping={"parent_library": "os.path"}), "os.path"),
    "further entry": (
        edit("config.json", auto_map={"AutoModelForMaskedLM": REFERENCE}),
        f"AutoModelForMaskedLM: {REFERENCE}",
    ),
    "own code as another": (
        edit("config.json", auto_map={"AutoTokenizer": "modeling_fox.FoxModel"}),
        "AutoTokenizer: modeling_fox.FoxModel",
    ),
    "another repository": (edit("config.json", auto_map={"AutoProcessor": "a/b--c.D"}), "AutoProcessor: a/b--c.D"),
    "nested": (edit("generation_config.json", a=[{"auto_map": {"x": REFERENCE}}]), REFERENCE),
    "escaped": (put("generation_config.json", '{"auto\\u005fmap": {"x": "mine.Mine"}}'), REFERENCE),
    "pipeline": (edit("config.json", custom_pipelines={"text": {"impl": REFERENCE}}), REFERENCE),
    "kernel of the Hub": (edit("generation_config.json", attn_implementation="a/kernel"), "a/kernel"),
    "kernel for a part": (edit("generation_config.json", attn_implementation={"": "a/kernel"}), "a/kernel"),
    "kernel by its inner name": (edit("config.json", _attn_implementation_internal="a/kernel"), "a/kernel"),
    "module with a space": (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["a b.C", None]}), "a b.C"),
    "generation loop elsewhere": (edit("generation_config.json", custom_generate="a/loop"), "a/loop"),
    "any key": (edit("generation_config.json", x="a/b--c.D"), "x: a/b--c.D"),
    "auto_map of a wrong type": (
        put("config.json", '{"model_type": "fox", "auto_map": ["a"]}'),
        "auto_map in .* must be an object",
    ),
}
FILES: dict[str, tuple[Spoil, str]] = {
    "password file": (link("tokenizer.json", "/etc/passwd"), "tokenizer.json"),
    "link beside": (link("LICENSE", "../secret"), "LICENSE"),
    "link to nowhere": (link("LICENSE", "nowhere"), "LICENSE"),
    "circle": (link("LICENSE", "LICENSE"), "LICENSE"),
    "linked folder": (link("data", ".."), "data"),
    "page": (put("index.html", "<script>"), "index.html"),
    "page as a license": (put("LICENSE.html", "<script>"), "LICENSE.html"),
    "program as a notice": (put("NOTICE.vbs"), "NOTICE.vbs"),
    "environment": (put(".env"), r"\.env"),
    "sub-folder": (put("old/LICENSE"), "old/LICENSE"),
    "folder that the Hub refuses": (put(".cache/LICENSE"), r"\.cache/LICENSE"),
    "backslash": (put("LICENSE\\x"), "characters that a name cannot have"),
    "line break": (put("LICENSE\nx"), "characters that a name cannot have"),
    "no UTF-8": (put("LICENSE\udcff"), "characters that a name cannot have"),
    "case": (lambda folder: [put(name)(folder) for name in ("LICENSE.md", "LICENSE.MD")], "upper and lower case"),
    "too large": (lambda folder: os.truncate(folder / "model.safetensors", 10**11), "more than 50 GB"),
}  # fmt: skip


@pytest.mark.parametrize("case", CODE)
def test_code_that_is_not_ours_is_refused_by_name(folder: Path, case: str) -> None:
    spoil, name = CODE[case]
    spoil(folder)
    with pytest.raises(ValueError, match=name):
        check_code(folder)


@pytest.mark.parametrize("case", PICKLED)
def test_what_may_run_code_is_found_under_any_name(tmp_path: Path, case: str) -> None:
    for name in ("LICENSE", "tokenizer.json", "plot.png", "model-x.safetensors"):
        put(name, PICKLED[case])(tmp_path)
        with pytest.raises(ValueError, match=rf"{name} \((a pickle|an archive|NumPy or HDF5)\)"):
            check_contents(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.gif", "a.webp"])
def test_what_is_no_image_is_refused(tmp_path: Path, name: str) -> None:
    for content in ("<html><script>alert(1)</script></html>", svg("<script/>"), b"x" + pickle.dumps(Harm())):
        put(name, content)(tmp_path)
        with pytest.raises(ValueError, match="not the image that"):
            check_contents(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "old/training_args.bin", "checkpoint-x/a.bin", "a.joblib", "A.PKL"]
)
def test_what_is_a_pickle_by_its_name_is_refused(tmp_path: Path, name: str) -> None:
    put(name)(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} \(a pickle by its name\)"):
        check_contents(tmp_path)


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"\x7fELF\2", b"MZ\x90\0", b"\0asm\1\0\0\0"])
def test_programs_are_refused(tmp_path: Path, content: bytes) -> None:
    put("LICENSE", content)(tmp_path)
    with pytest.raises(ValueError, match=r"LICENSE \(a program\)"):
        check_contents(tmp_path)


@pytest.mark.parametrize("case", DRAWN)
def test_active_drawings_are_refused(tmp_path: Path, case: str) -> None:
    for encoding in ("utf-8", "utf-16"):
        put("plot.svg", DRAWN[case].encode(encoding))(tmp_path)
        with pytest.raises(ValueError, match=r"plot\.svg \((a|no valid) drawing"):
            check_contents(tmp_path)


@pytest.mark.parametrize("case", FILES)
def test_files_that_must_not_be_uploaded_are_named(folder: Path, case: str) -> None:
    put("../secret")(folder)
    spoil, message = FILES[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_files(folder)


@pytest.mark.parametrize("case", SECRETS)
def test_secrets_are_found_in_any_encoding(tmp_path: Path, case: str) -> None:
    for encoding in ("utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-be", "utf-32"):
        put("NOTICE", f"Voilà\nkey = '{SECRETS[case]}'\n".encode(encoding))(tmp_path)
        with pytest.raises(ValueError, match=r"password or key: NOTICE \("):
            check_secrets(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (put("README.md", f"---\nlicense: mit\n---\n\n<!-- {HF} -->\n"), "README.md"),
        (edit("config.json", note=HF), "config.json"),
        (edit("generation_config.json", a=[[{"b": [HF]}]]), "generation_config.json"),
        (put("generation_config.json", json.dumps({"a": HF}).replace("hf_", "\\u0068f_")), "generation_config.json"),
        (put("tokenizer.json", json.dumps({"vocab": {HF: 1}})), "tokenizer.json"),
        (put("vocab.txt", "a " * 20_000 + HF + " b" * 20_000), "vocab.txt"),
        (safetensors_of({"format": "pt", "made_with": HF}), "other.safetensors"),
        (put("plot.png", b"\x89PNG\r\n\x1a\n\0\0\0\0tEXtComment\0" + HF.encode() + b"\0"), "plot.png"),
        (put("model.safetensors", HF), "model.safetensors"),
    ],
)
def test_secrets_are_found_wherever_they_are(folder: Path, spoil: Spoil, name: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=rf"password or key: {name} \("):
        check_secrets(folder)


def test_without_detect_secrets_nothing_is_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_scan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"detect-secrets.* is not installed.*pip install 'foxlm\[publish\]'"):
        check_secrets(folder)


# As model repositories have them: vocabularies of all kinds of words, plots, results, texts that begin as pickles do.
ORDINARY: dict[str, str | bytes] = {
    "tokenizer.json": json.dumps(
        {
            "added_tokens": [{"id": i, "content": f"<|reserved_{i}|>"} for i in range(300)],
            "model": {
                "vocab": {
                    word: i
                    for i, word in enumerate(
                        ["password", "secret", "api_key", "://", "@", "hf_", "AKIA", "sk-", "-----BEGIN", "token:"]
                        + [a + b * 20 for a in string.ascii_letters for b in string.ascii_letters]
                        + ["APCABCDEFGHIJ", "192.168.10.20", "0123456789" * 3, "aws_secret", "PRIVATE KEY"]
                    )
                },
                "merges": [f"{a} {b}" for a in string.ascii_letters for b in string.ascii_letters],
            },
        }
    ),
    "vocab.txt": "\n".join(["[PAD]", "cat", "dog", "Run", "c", "os", "system", "(S'true'", "tR."]),
    "merges.txt": "#version: 0.2\nĠ t\nĠ a\nh e\n",
    "chat_template.jinja": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}",
    "LICENSE": "MIT License\n\n(c) 2026 Someone\n",
    "LICENSE.txt": "cat\ndog\nReady.\n",
    "NOTICE": "N.\n",
    "NOTICE.md": "(is\n",
    "NOTICE-de": "x^2 für uns".encode("latin-1"),
    "plot.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 99,
    "photo.jpg": b"\xff\xd8\xff\xe0" + b"\0" * 99,
    "moving.gif": b"GIF89a" + b"\0" * 99,
    "photo.webp": b"RIFF\n\0\0\0WEBP" + b"\0" * 99,
    "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" * 50,
    "plot.svg": '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN"\n'
    ' "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">\n'
    + svg(
        '<metadata><a xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#" resource="http://purl.org/x"/></metadata>'
        "<defs><style>*{stroke-linejoin: round}</style><clipPath id='a'/></defs>"
        "<g clip-path='url(#a)'><use xlink:href='#m' style='fill: url(&quot;#b&quot;)'/></g>"
    ),
}  # fmt: skip


def test_ordinary_files_pass(folder: Path) -> None:
    for name, content in ORDINARY.items():
        put(name, content)(folder)
    for check in (check_files, check_contents, check_secrets, check_code):
        check(folder)


@pytest.mark.parametrize("length", [112, 384, 640, 896, 1152])
def test_header_of_any_length_is_no_pickle(folder: Path, length: int) -> None:
    """Its first bytes are the header's length: those of 640 are those of a pickle of protocol 2."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
    put("model.safetensors", length.to_bytes(8, "little") + header + b"\0" * 4)(folder)
    check_contents(folder)


def test_allowed_code_passes_by_name_only(folder: Path) -> None:
    put("mine.py", "#!/usr/bin/env python\nclass Mine: ...\n")(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})(folder)
    edit("config.json", auto_map={"AutoProcessor": "a/b--c.D"})(folder)
    allowed = ["mine.py", "a/b--c.D"]
    assert check_code(folder, allowed).endswith("; mine.py; a/b--c.D")
    for check in (check_files, check_contents):
        check(folder, allowed)
    for one, missing in (("mine.py", "a/b--c.D"), ("a/b--c.D", "mine.py")):
        with pytest.raises(ValueError, match=missing):
            check_code(folder, [one])
    with pytest.raises(ValueError, match=r"--allow-code names what is not there: other\.py"):
        check_code(folder, [*allowed, "other.py"])
    result = CliRunner().invoke(app, ["publish", str(folder), "--allow-code", "mine.py"])
    assert "code is not foxlm's own" in result.stdout and "AutoProcessor: a/b--c.D in config.json" in result.stdout


def test_allowed_tokenizer_is_tried(folder: Path) -> None:
    code = "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): ...\n"
    put("mine.py", code)(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mine.Mine"]}, tokenizer_class="Mine")(folder)
    assert folder_checks.check_tokenizer(folder, ["mine.py"]).startswith("Mine, ")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A folder for each command that reads one, each with a file that is a link to elsewhere."""
    (tmp_path / "secret").write_text("{}")
    fox = tmp_path / "fox"
    tiny_model(dtype=torch.float32).save_pretrained(fox)
    llama = tmp_path / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(llama)
    theirs = tmp_path / "theirs"
    write(theirs, {"model_type": "forgetting_transformer"}, {"a": torch.ones(1)})
    return {"fox": fox, "llama": llama, "theirs": theirs}


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "tokenizer.json", "nowhere"])
def test_links_that_leave_are_refused_by_every_command(sources: dict[str, Path], target: str, tmp_path: Path) -> None:
    for source in sources.values():
        (source / "tokenizer.json").symlink_to(target)
    out = tmp_path / "out"
    commands = [
        ["convert", str(sources["theirs"]), str(out)],
        ["graft", str(sources["llama"]), str(out)],
        ["card", str(sources["fox"])],
        ["export-code", str(sources["fox"])],
    ]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1 and "tokenizer.json is a link that leads out of its folder" in result.stderr, (
            command
        )
        assert not out.exists() and not (sources["fox"] / "README.md").exists()


def test_the_cache_of_the_hub_is_a_source(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("llama", "fox"):
        blobs, snapshot = tmp_path / f"models--a--{name}/blobs", tmp_path / f"models--a--{name}/snapshots/0123"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, file in enumerate(path for path in sources[name].iterdir() if path.suffix != ".py"):
            shutil.copy(file, blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        if name == "llama":
            graft_to_folder(snapshot, tmp_path / "grafted")
        else:
            with pytest.raises(ValueError, match="must be"):
                convert_to_folder(snapshot, tmp_path / "converted", to="authors")
    # Written to in place of the links, not through them.
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    assert CliRunner().invoke(app, ["export-code", str(snapshot)]).exit_code == 0
    assert not (snapshot / "config.json").is_symlink() and before == {
        path: path.read_bytes() for path in blobs.iterdir()
    }


def test_graft_does_not_write_into_its_source(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["llama"]
    (tmp_path / "link").symlink_to(source)
    (source / "sub").mkdir()
    for out in (source / "new", source / "sub/new", tmp_path / "link/new", source / "sub/../new", tmp_path / "link"):
        before = sorted(source.rglob("*"))
        with pytest.raises(ValueError, match=r"must not lie in the source|is there already"):
            graft_to_folder(source, out)
        assert sorted(source.rglob("*")) == before


def test_code_in_a_source_is_not_copied(sources: dict[str, Path], tmp_path: Path) -> None:
    (sources["llama"] / "tokenizer_llama.py").write_text("raise SystemExit\n")
    graft_to_folder(sources["llama"], tmp_path / "grafted")
    assert not (tmp_path / "grafted/tokenizer_llama.py").exists()


def test_scanning_reads_no_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse gigabyte takes as long as nothing."""
    read = 0
    header = json.dumps({"a": {"dtype": "U8", "shape": [10**9], "data_offsets": [0, 10**9]}}).encode()
    put("model.safetensors", len(header).to_bytes(8, "little") + header)(folder)
    os.truncate(folder / "model.safetensors", 8 + len(header) + 10**9)
    text = secret_scan._text

    def counted(file: Path):
        nonlocal read
        for piece in text(file):
            read += len(piece)
            yield piece

    monkeypatch.setattr(secret_scan, "_text", counted)
    for check in (check_files, check_contents, check_secrets):
        check(folder)
    assert read < 100_000
