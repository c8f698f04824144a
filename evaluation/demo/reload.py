"""Load the saved model in a new process, as a user would, and generate and score with it.

``python -m foxlm.evaluation.demo.reload MODEL REQUEST`` reads ``{"prompts", "windows", "device", "seed",
"new_tokens", "batch"}`` from the JSON file REQUEST and prints ``{"generated", "bits_per_byte", "seconds_to_load",
"class"}`` as its last line.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def reload_and_generate(model: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run this module in a process of its own.

    Args:
        model: folder with model and tokenizer.
        request: as above.

    Returns:
        The answer, as above.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "foxlm.evaluation.demo.reload", str(model), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"reloading the saved model ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(folder: str, request_path: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import foxlm  # noqa: F401  (registers FoX with the Auto classes)

    from .train import bits_per_byte

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder).to(request["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seconds = time.monotonic() - began
    generated = []
    for prompt in request["prompts"]:
        torch.manual_seed(request["seed"])
        inputs = tokenizer(prompt, return_tensors="pt").to(request["device"])
        tokens = model.generate(
            **inputs, max_new_tokens=request["new_tokens"], do_sample=True, temperature=0.6, top_p=0.95, top_k=0
        )
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        generated.append({"prompt": prompt, "text": text})
    answer = {
        "class": type(model).__name__,
        "seconds_to_load": seconds,
        "generated": generated,
        "bits_per_byte": bits_per_byte(model, np.array(request["windows"]), request["batch"]),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(*sys.argv[1:])
