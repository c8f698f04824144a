"""`foxlm bench attention`: one attention layer, forward and backward, beside others."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from .bars import attention_bars
from .competitors import COMPETITORS
from .implementations import Implementation, with_names
from .inputs import Case, Inputs, make_inputs
from .own import OWN
from .recorded import Recorded
from .runner import Bench, Record, failure
from .timing import Copy, Matmul, interleaved, progress, release_memory

# 32k tokens in sequences of 4k to 64k, fewer heads, and heads of 128.
CASES = (
    Case(8, 24, 64, 4096),
    Case(4, 24, 64, 8192),
    Case(2, 24, 64, 16384),
    Case(2, 12, 64, 16384),
    Case(2, 16, 128, 16384),
    Case(1, 24, 64, 65536),
)
# A million tokens, with pruning only: without, one pass would take seconds.
LONG_CASE = Case(1, 4, 64, 1 << 20)
CPU_CASE = Case(1, 4, 16, 256)

_LONG_ROUNDS = 3
_MATMUL, _COPY = ("matmul", ""), ("copy", "")

Call = tuple[str, str]
"""Name of an implementation and what of it is timed."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of queries, keys and values.
        rounds: timed calls in each of two passes.
        seed: of the inputs and of the rows that are checked.
    """

    device: str
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 15
    seed: int = 0


def chosen(names: Sequence[str]) -> list[Implementation]:
    """The implementations whose names contain one of ``names``; all of them for none."""
    return with_names([*OWN, *COMPETITORS], names)


def run_case(case: Case, implementations: Sequence[Implementation], settings: Settings) -> Record:
    """Check and time implementations on synthetic inputs of one shape.

    Returns:
        ``case`` and ``kv_heads``; ``ceiling_tflops`` and ``copy_rate``, the rates of a large matrix product and of a
        large copy (bytes per second) timed between the others; ``implementations``, a record of each (see `Bench`),
        with ``forward``, ``forward_backward`` and ``boundaries`` where it was measured; ``open_gates``, records of this
        library's own where nothing can be pruned; ``bars``. An ``error`` says what ended the case early.
    """

    def measure(record: Record) -> None:
        inputs = make_inputs(case, settings.device, settings.dtype, settings.seed)
        record |= _measure(case, inputs, implementations, settings)
        own = [one for one in implementations if one in OWN]
        if case != LONG_CASE and len(own) > 1:
            record["open_gates"] = _measure(case, inputs.open(), own, settings)["implementations"]

    return _guarded(_new_record(case), measure, settings)


def run_recorded(recorded: Recorded, implementations: Sequence[Implementation], settings: Settings) -> Record:
    """Check and time implementations on what enters attention in a model that reads text.

    Returns:
        As `run_case`, without records for open gates, and ``recorded``, where the inputs are from.
    """
    record = _new_record(recorded.case) | {"recorded": recorded.facts}
    return _guarded(
        record, lambda into: into.update(_measure(recorded.case, recorded.inputs, implementations, settings)), settings
    )


def _new_record(case: Case) -> Record:
    rates = {"ceiling_tflops": None, "copy_rate": None}
    return (
        {"case": str(case), "kv_heads": case.kv_heads or case.heads} | rates | {"implementations": [], "open_gates": []}
    )


def _guarded(record: Record, measure: Callable[[Record], None], settings: Settings) -> Record:
    """Let ``measure`` fill ``record``; what it raises becomes part of it."""
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    try:
        measure(record)
    except Exception as error:
        # Of any kind: one case that does not fit must not end the others.
        record["error"] = failure(error)["detail"]
    release_memory(settings.device)
    return record | {"bars": attention_bars(record)}


def _measure(case: Case, inputs: Inputs, implementations: Sequence[Implementation], settings: Settings) -> Record:
    """``implementations``, ``ceiling_tflops`` and ``copy_rate`` of a record."""
    bench = Bench(inputs, settings.device, settings.seed)
    for implementation in progress(implementations, f"checking {case}"):
        bench.admit(implementation)
    matmul, copy = Matmul(settings.device, settings.dtype), Copy(settings.device)
    calls: dict[Call, Callable[[], object]] = {_MATMUL: matmul, _COPY: copy}
    for name, runner in bench.runners.items():
        calls |= {(name, part): call for part, call in runner.calls.items()}
    rounds = min(settings.rounds, _LONG_ROUNDS) if case == LONG_CASE else settings.rounds
    times = interleaved(calls, rounds, settings.device)
    ceiling = matmul.flops / times[_MATMUL].ms / 1e9
    for one in bench.records:
        one |= {part: asdict(timing) for (name, part), timing in times.items() if name == one["name"]}
        for part in ("forward", "forward_backward"):
            if part in one:
                one[part] |= _rates(case.flops(part == "forward_backward"), one[part]["ms"], one["tiles_kept"], ceiling)
    rate = 1e3 * copy.bytes / times[_COPY].ms
    return {"implementations": bench.records, "ceiling_tflops": ceiling, "copy_rate": rate}


def _rates(flops: float, ms: float, kept: float, ceiling: float) -> dict[str, float]:
    """TFLOP/s of the causal products as if nothing were pruned, and of the tiles that are kept."""
    dense = flops / ms / 1e9
    return {"dense_tflops": dense, "done_tflops": dense * kept, "of_ceiling": dense * kept / ceiling}
