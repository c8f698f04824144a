"""`foxlm serve`: transformers' server answers with a FoX model."""

import importlib.util
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from typer.testing import CliRunner

from foxlm import FoxForCausalLM
from foxlm.cli import app
from foxlm.cli.serve import fox_server
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from hostile_folders import HOSTILE, fox_folder
from ranks import free_port

NEEDED = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def ask(url: str, **fields: Any) -> str:
    request = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "fox"
    fox_folder(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    port = free_port()
    server = fox_server()(str(model), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except URLError:
                time.sleep(0.1)
        yield address
    finally:
        server.kill_server()


@pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")
def test_answers_whole_and_in_parts(model: Path, address: str) -> None:
    asked = {
        "model": str(model),
        "messages": [{"role": "user", "content": "well"}],
        "max_tokens": 6,
        "temperature": 0.0,
    }
    ids = byte_tokenizer()("well", return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = FoxForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=6, do_sample=False)
    expected = byte_tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    whole = json.loads(ask(f"{address}/v1/chat/completions", **asked, stream=False))
    assert whole["choices"][0]["message"]["content"] == expected
    events = ask(f"{address}/v1/chat/completions", **asked, stream=True).split("\n\n")
    parts = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    written_in_parts = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
    # A character that is not whole is held back.
    assert written_in_parts == expected.rstrip("\N{REPLACEMENT CHARACTER}") or written_in_parts == expected[:-1]
    assert len(parts) > 1


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", "model"])
    assert result.exit_code == 1
    assert result.stderr == "error: foxlm serve needs fastapi, uvicorn and openai: pip install 'foxlm[serve]'\n"


@pytest.mark.skipif(bool(NEEDED), reason=f"needs {', '.join(NEEDED)}")
@pytest.mark.parametrize("case", ["truncated weights", "config is nested deeply", "auto_map is a list", "no heads"])
def test_broken_folders_are_refused_before_it_listens(case: str, tmp_path: Path) -> None:
    fox_folder(tmp_path / "fox")
    change, named = HOSTILE[case]
    change(tmp_path / "fox")
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "fox"), "--device", "cpu", "--port", "1"])
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and last.startswith("error: ") and named in last, last
