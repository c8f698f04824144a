"""How long a new process takes until it has something to show, with an empty folder of compiled kernels and a full one.

Each measurement is a process of its own, which reads a pickled `Start` and prints JSON.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from foxlm import FoxConfig
from foxlm.modeling.configuration_fox import DEFAULT_EPS

from ..gates import RULES
from .attention.correctness import Reference, Sample
from .attention.implementations import OURS
from .attention.inputs import Case, make_inputs
from .attention.measured import Calls
from .generation import DTYPE, generation_fault
from .models import LogitsCheck, Workload, build_llama
from .results import Row
from .runner import Variant
from .timing import synchronize

NEW = 16
_TOKENS = {"cuda": 1024, "cpu": 64}
# Of one attention layer.
_ATTENTION_TOKENS = {"cuda": 4096, "cpu": 64}
_MAIN = (
    "import time; began = time.perf_counter(); import torch; from foxlm import FoxForCausalLM; "
    "took = time.perf_counter() - began; from foxlm.evaluation.benchmark import cold_start; cold_start.main(took)"
)


@dataclass(frozen=True)
class Start:
    """What a new process does.

    Attributes:
        what: ``"foxlm"`` and ``"Llama"`` generate tokens; ``"attention"`` is a forward and a backward pass of one
            attention layer with the heads of the FoX.
        empty: whether no kernel has been compiled before.
    """

    what: Literal["foxlm", "Llama", "attention"]
    empty: bool = False

    @property
    def name(self) -> str:
        """As it appears in rows, after the part."""
        what = "foxlm, attention forward and backward" if self.what == "attention" else self.what
        return f"start: {what}" + (", empty kernel cache" if self.empty else "")

    @property
    def against(self) -> dict[str, str]:
        """As of `Call`."""
        if self.what != "foxlm":
            return {}
        return {"llama": Start("Llama").name} | ({"own": Start("foxlm").name} if self.empty else {})


# Before the others the one that leaves behind what they find.
STARTS = (Start("foxlm", empty=True), Start("foxlm"), Start("Llama"), Start("attention", empty=True))


def start_variants(starts: Sequence[Start], workload: Workload) -> Iterator[Variant]:
    """A variant for each of ``starts``; compiled kernels go to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        for one in starts:
            yield _ColdStart(one, workload, Path(folder) / one.what)


class _ColdStart:
    """One new process."""

    def __init__(self, one: Start, workload: Workload, kernels: Path) -> None:
        tokens = (_ATTENTION_TOKENS if one.what == "attention" else _TOKENS)[workload.device]
        self.facts: Row = {"part": "start", "name": one.name, "family": "Llama" if one.what == "Llama" else "foxlm"}
        self.facts |= {"batch": 1, "tokens": tokens, "against": one.against}
        self._one, self._workload, self._kernels = one, workload, kernels

    def check(self, row: Row) -> str | None:
        if self._one.empty:
            shutil.rmtree(self._kernels, ignore_errors=True)
        elif not self._kernels.exists() and self._one.what != "Llama":
            self._run()
        found = self._run()
        row |= found["row"] | {"import_seconds": found["import"], "load_seconds": found["load"]}
        self._times = {name: [1e3 * found[name]] for name in ("first", "again")}
        return found["fault"]

    def _run(self) -> dict[str, Any]:
        self._kernels.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", _MAIN],
            input=pickle.dumps((self._one, self._workload, self.facts["tokens"])),
            capture_output=True,
            env=os.environ | {"TRITON_CACHE_DIR": str(self._kernels)},
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"the process ended with {done.returncode}: {lines[-1] if lines else 'no message'}")
        return json.loads(done.stdout.splitlines()[-1])

    def time(self, rounds: int) -> dict[str, list[float]]:
        return self._times

    def derive(self, row: Row) -> None:
        pass


def main(import_seconds: float) -> None:
    """Do what the `Start` on stdin says, and print how long each part took, in seconds, and what is wrong, if anything.

    Args:
        import_seconds: what it took to import torch and foxlm.
    """
    start, workload, tokens = pickle.load(sys.stdin.buffer)
    found = (_attend if start.what == "attention" else _generate)(start, workload, tokens)
    print(json.dumps({"import": import_seconds, **found}))


def _generate(start: Start, workload: Workload, tokens: int) -> dict[str, Any]:
    config = workload.build(DTYPE).config if start.what == "Llama" else None
    began = time.perf_counter()
    model: Any = workload.build(DTYPE) if config is None else build_llama(config, workload.device, DTYPE)
    # As many tokens as asked for.
    model.eval().generation_config = GenerationConfig()
    ids = workload.ids(model.config.vocab_size, 1, tokens)
    synchronize(workload.device)
    took = {"load": time.perf_counter() - began}

    def call() -> None:
        model.generate(ids, max_new_tokens=NEW, do_sample=False)

    took |= {name: _seconds(call, workload.device) for name in ("first", "again")}
    row: Row = {}
    return took | {"fault": generation_fault(LogitsCheck(), start.what, model, ids, row), "row": row}


def _attend(start: Start, workload: Workload, tokens: int) -> dict[str, Any]:
    began = time.perf_counter()
    heads, _, head_dim = FoxConfig.preset(workload.preset, **dict(workload.sizes)).heads
    inputs = make_inputs(Case(1, heads, head_dim, tokens), workload.device, DTYPE, workload.seed)
    calls = Calls(next(one for one in OURS if one.rule == RULES[-1]), inputs)
    synchronize(workload.device)
    took = {"load": time.perf_counter() - began}
    took |= {name: _seconds(calls.forward_backward, workload.device) for name in ("first", "again")}
    row: Row = {}
    sample = Sample.of(inputs, workload.seed)
    fault = Reference(inputs, sample).fault(calls.results(sample.only(inputs.dout)), DEFAULT_EPS, row)
    return took | {"fault": fault, "row": row}


def _seconds(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began
