"""`python -m foxlm.evaluation.speed attention`: one attention layer, forward and backward, beside others."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from .bars import attention_bars
from .competitors import COMPETITORS
from .implementations import Implementation, with_names
from .inputs import Case, Inputs, make_inputs
from .own import OWN
from .runner import Bench, Record, failure
from .timing import Matmul, interleaved, release_memory

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
_CEILING = ("matmul", "")

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
    """Check and time implementations on one shape.

    Returns:
        ``case``; ``ceiling_tflops``, the rate of a large matrix product timed between the others; ``implementations``,
        a record of each (see `Bench`), with ``forward``, ``forward_backward`` and ``boundaries`` where it was measured;
        ``open_gates``, records of this library's own where nothing can be pruned; ``bars``. An ``error`` says what
        ended the case early.
    """
    record: Record = {"case": str(case), "ceiling_tflops": None, "implementations": [], "open_gates": []}
    # What was compiled for other shapes would count against the limit of recompilations.
    torch.compiler.reset()
    try:
        inputs = make_inputs(case, settings.device, settings.dtype, settings.seed)
        record["implementations"], record["ceiling_tflops"] = _measure(case, inputs, implementations, settings)
        own = [one for one in implementations if one in OWN]
        if case != LONG_CASE and len(own) > 1:
            record["open_gates"], _ = _measure(case, inputs.open(), own, settings)
    except Exception as error:
        # Of any kind: one case that does not fit must not end the others.
        record["error"] = failure(error)["detail"]
    release_memory(settings.device)
    return record | {"bars": attention_bars(record)}


def _measure(
    case: Case, inputs: Inputs, implementations: Sequence[Implementation], settings: Settings
) -> tuple[list[Record], float]:
    """Records of all implementations, and TFLOP/s of the matrix product."""
    bench = Bench(inputs, settings.device, settings.seed)
    for implementation in implementations:
        bench.admit(implementation)
    matmul = Matmul(settings.device, settings.dtype)
    calls: dict[Call, Callable[[], object]] = {_CEILING: matmul}
    for name, runner in bench.runners.items():
        calls |= {(name, part): call for part, call in runner.calls.items()}
    rounds = min(settings.rounds, _LONG_ROUNDS) if case == LONG_CASE else settings.rounds
    times = interleaved(calls, rounds, settings.device)
    ceiling = matmul.flops / times[_CEILING].ms / 1e9
    for one in bench.records:
        one |= {part: asdict(timing) for (name, part), timing in times.items() if name == one["name"]}
        for part in ("forward", "forward_backward"):
            if part in one:
                one[part] |= _rates(case.flops(part == "forward_backward"), one[part]["ms"], one["tiles_kept"], ceiling)
    return bench.records, ceiling


def _rates(flops: float, ms: float, kept: float, ceiling: float) -> dict[str, float]:
    """TFLOP/s of the causal products as if nothing were pruned, and of the tiles that are kept."""
    dense = flops / ms / 1e9
    return {"dense_tflops": dense, "done_tflops": dense * kept, "of_ceiling": dense * kept / ceiling}
