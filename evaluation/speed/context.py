"""`foxlm bench context`: one attention layer whose sequence lies on several GPUs of this host, beside one GPU with all.

Every rank runs `measure_on_rank`. Of each case, in this order:

1. each rank by itself computes output and gradients of the whole sequence, on inputs that all draw from the same seed;
2. all together compute them, each of its tokens, and are held to the first, head by head: what is wrong is not timed;
3. bytes of keys and values that one forward pass moves, and that ring attention would;
4. times of both, in turn: of calls that begin on idle GPUs, and of several in a row without waiting, as a model's
   layers are called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch import Tensor

from foxlm.kernels.context_parallel.api import context_parallel_attention
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.kernels.context_parallel.shards import Shards
from foxlm.kernels.pruning.rules import Rule

from ..results import write_whole
from .implementations import EPS, Attend, Implementation, pruning_options
from .inputs import Case, Inputs, make_inputs
from .own import own
from .processes import RECORDS, records_of
from .report import to_json
from .runner import Record, Runner, failure
from .timing import PASSES, Timing, progress, release_memory, synchronize, timed, timing_of

CASES, CPU_CASES = (Case(1, 24, 64, 131072),), (Case(1, 4, 16, 1024),)

# Calls that are queued without waiting in between; of one on idle GPUs what its host does first is a larger part.
IN_A_ROW = 6
_WARM_UP_ROUNDS = 2
_PARTS = ("forward", "forward_backward")
# Sums in float32 in another order; what a row may lose by pruning where tiles lie otherwise, with room.
_FLOAT32_SUMS, _EPS_FACTOR = 1e-5, 4.0

SharedAttend = Callable[..., Tensor]
"""As `context_parallel_attention`."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class ContextRecipe:
    """What is measured on how many GPUs.

    Attributes:
        cases: shapes of the whole sequences.
        gpus: ranks, two at least.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of queries, keys and values.
        rule: of pruning, None without.
        split: who gets which tokens, as of `ContextParallel`.
        rounds: timed calls in each of two passes.
        seed: of the inputs.
        attend: what is measured; importable by name.
    """

    cases: Sequence[Case]
    gpus: int
    device: str
    dtype: torch.dtype = torch.bfloat16
    rule: Rule | None = "tight"
    split: str = "balanced"
    rounds: int = 7
    seed: int = 0
    attend: SharedAttend = context_parallel_attention

    @property
    def limit(self) -> float:
        """Largest relative distance of a head's output or gradients from one device's: two roundings to the type."""
        pruning = 0.0 if self.rule is None else _EPS_FACTOR * EPS
        return torch.finfo(self.dtype).eps + _FLOAT32_SUMS + pruning


def run_context(recipe: ContextRecipe) -> Record:
    """Check and time attention of shared sequences, in a process for each GPU.

    Returns:
        ``cases``, a record of each: ``case`` and ``status`` (``measured``, ``wrong``, ``failed`` where one GPU cannot
        compute it, ``unfinished``, with a ``reason``); ``errors`` of the output ``out`` and of the gradients of ``q``,
        ``k``, ``v`` and ``log_f``, relative to the norm, ``errors_of_heads``, each of its worst head, and their
        ``limit``; ``same_bits``, whether two runs gave the same; ``traffic``: bytes ``moved`` to all ranks by a forward
        pass, those of a ``ring``, and their ``share``; ``times`` in ms by part, of ``one`` GPU (the fastest) and
        ``together`` (the slowest of each call), ``idle`` and ``in_a_row``, and their ``speedup``. If a process fails,
        or on Ctrl-C, what was measured before, with an ``error`` and its ``detail``.

    Raises:
        RankError: a process failed before anything was measured.
    """
    return records_of(measure_on_rank, recipe.gpus, recipe.device, recipe)


def measure_on_rank(rank: int, recipe: ContextRecipe, folder: str) -> None:
    """Measure with all other ranks; rank 0 leaves its records in ``folder``, after each part."""
    context = ContextParallel(split=recipe.split)
    records: list[Record] = []

    def save() -> None:
        if rank == 0:
            write_whole(Path(folder) / RECORDS, to_json({"cases": records}))

    for case in recipe.cases:
        record: Record = {"case": str(case), "status": "unfinished", "reason": "the run ended before"}
        records.append(record)
        save()
        if rank == 0:
            typer.echo(f"measuring {case}", err=True)
        found = _measure(case, recipe, context)
        record.pop("reason")
        record |= {"status": "measured"} | found
        save()
        release_memory(recipe.device)


def _measure(case: Case, recipe: ContextRecipe, context: ContextParallel) -> Record:
    """The record of one case, but for its name."""
    found, fault = _alone(partial(_on_one, case, recipe, context.rank))
    if found is None or fault is not None:
        return fault or {}
    inputs, one, expected = found
    shards = context.shards(case.tokens)
    own_part = _own_part(inputs, shards)
    together = Runner(_shared(recipe, context, case.tokens), own_part)
    record = _check(together, own_part.dout, {name: shards.take(x) for name, x in expected.items()}, recipe.limit)
    del found, expected
    if "status" in record:
        return record
    release_memory(recipe.device)
    record["traffic"] = _traffic(together, context, recipe.device)
    record["times"] = _times(one, together, recipe, f"timing {case}" if context.rank == 0 else None)
    return record


def _on_one(case: Case, recipe: ContextRecipe, rank: int) -> tuple[Inputs, Runner, dict[str, Tensor]]:
    """The inputs of the whole sequence, what attends to them on this device alone, and its output and gradients."""
    # Random numbers need the number of the device.
    device = f"cuda:{rank}" if recipe.device == "cuda" else recipe.device
    inputs = make_inputs(case, device, recipe.dtype, recipe.seed)
    runner = Runner(own(recipe.rule), inputs)
    return inputs, runner, _results(runner, inputs.dout)


def _results(runner: Runner, dout: Tensor) -> dict[str, Tensor]:
    out, gradients = runner.results(dout)
    return {"out": out, **gradients}


def _own_part(inputs: Inputs, shards: Shards) -> Inputs:
    """Of this rank's tokens."""
    q, k, v, log_f, dout = (shards.take(x) for x in (inputs.q, inputs.k, inputs.v, inputs.log_f, inputs.dout))
    return inputs._replace(q=q, k=k, v=v, log_f=log_f, dout=dout)


def _shared(recipe: ContextRecipe, context: ContextParallel, length: int) -> Implementation:
    """Attention of this rank's tokens to those of all."""

    def prepare(inputs: Inputs) -> Attend:
        options = {"context": context, "length": length, "scale": inputs.scale}
        return partial(recipe.attend, **options, **pruning_options(inputs, recipe.rule))

    return Implementation(f"on {recipe.gpus} GPUs", prepare, rule=recipe.rule)


def _check(together: Runner, dout: Tensor, expected: Mapping[str, Tensor], limit: float) -> Record:
    """Errors of what all compute together, and whether it is the same each time; with a ``status`` if it is wrong."""
    first, second = (_results(together, dout) for _ in range(2))
    # All ranks know what any of them has found, so that all go the same way.
    same = torch.tensor([int(all(torch.equal(first[name], second[name]) for name in first))], device=dout.device)
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    squares = torch.stack([_squares(first[name], right) for name, right in expected.items()])
    dist.all_reduce(squares)
    whole, of_heads = relative_errors(squares.cpu())
    worst = dict(zip(expected, of_heads.amax(1).tolist(), strict=True))
    errors = dict(zip(expected, whole.tolist(), strict=True))
    record: Record = {"errors": errors, "errors_of_heads": worst, "limit": limit, "same_bits": bool(same)}
    for name, error in worst.items():
        # Not the other way round: a NaN is within no limit.
        if not error <= limit:
            what = "output" if name == "out" else f"gradient of {name}"
            reason = f"{what} is off by {error:.1e} in the worst head, {limit:.1e} allowed"
            return record | {"status": "wrong", "reason": reason}
    return record


def _squares(found: Tensor, right: Tensor) -> Tensor:
    """``[2, H]`` float64 sums of squares of this rank's errors, and of what is right."""
    both = torch.stack([found.float() - right.float(), right.float()])
    # Heads first; gates have no further dimension.
    return both.movedim(3, 1).flatten(2).double().square().sum(-1)


def relative_errors(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Distances relative to the norm: of each tensor, and of each of its heads.

    Heads that forget slowly have a small output, whose loss the whole would hardly show.

    Args:
        squares: ``[N, 2, H]`` sums of squares of what is off, and of what is right.

    Returns:
        ``[N]`` and ``[N, H]``; 0 where nothing is off, even from zeros.
    """

    def relative(off: Tensor, right: Tensor) -> Tensor:
        return torch.where(off == 0.0, 0.0, (off / right).sqrt())

    return relative(*squares.sum(-1).unbind(1)), relative(*squares.unbind(1))


def _traffic(together: Runner, context: ContextParallel, device: str) -> Record:
    """Bytes of one forward pass, over all ranks."""
    context.traffic.clear()
    together.forward()
    synchronize(device)
    own_bytes = (context.traffic.moved, context.traffic.ring)
    moved, ring = (sum(of_rank) for of_rank in zip(*_gathered(own_bytes), strict=True))
    return {"moved": moved, "ring": ring, "share": moved / ring}


def _times(one: Runner, together: Runner, recipe: ContextRecipe, label: str | None) -> Record:
    """Times by part, and how many times as fast all together are. With a progress bar where there is a ``label``."""
    runners = {"one": one, "together": together}
    calls = {(part, who): runner.calls[part] for part in _PARTS for who, runner in runners.items()}
    for _ in range(_WARM_UP_ROUNDS):
        for call in calls.values():
            call()
    rows = {"idle": 1, "in_a_row": IN_A_ROW}
    passes: list[dict[tuple[str, str, str], list[float]]] = []
    for number in range(PASSES):
        own_pass: dict[tuple[str, str, str], list[float]] = {(*key, row): [] for key in calls for row in rows}
        rounds: Any = range(recipe.rounds)
        for _ in rounds if label is None else progress(rounds, f"{label}, pass {number + 1} of {PASSES}"):
            for (part, who), call in calls.items():
                for row, count in rows.items():
                    own_pass[part, who, row].append(_ms_from_idle(call, count, recipe.device))
        passes.append(own_pass)
    of_ranks = _gathered(passes)
    times: Record = {part: {"one": {}, "together": {}, "speedup": {}} for part in _PARTS}
    for part in _PARTS:
        for row in rows:
            alone = fastest([[each[part, "one", row] for each in of_rank] for of_rank in of_ranks])
            shared = slowest([[each[part, "together", row] for each in of_rank] for of_rank in of_ranks])
            times[part]["one"][row], times[part]["together"][row] = asdict(alone), asdict(shared)
            times[part]["speedup"][row] = alone.ms / shared.ms
    return times


def _ms_from_idle(call: Callable[[], object], count: int, device: str) -> float:
    """Milliseconds of a call, of ``count`` in a row, where all ranks begin with nothing left to do."""

    def row() -> None:
        for _ in range(count):
            call()

    dist.barrier()
    synchronize(device)
    read = timed(row, device)
    synchronize(device)
    return read() / count


def fastest(of_ranks: Sequence[list[list[float]]]) -> Timing:
    """Of calls that each rank makes by itself: those of the rank with the shortest median."""
    return min(map(timing_of, of_ranks), key=lambda timing: timing.ms)


def slowest(of_ranks: Sequence[list[list[float]]]) -> Timing:
    """Of calls that all ranks make together: of each call, the rank that is done last.

    Args:
        of_ranks: for each rank and pass, milliseconds of each round.
    """
    return timing_of(np.max(np.array(of_ranks), axis=0).tolist())


def _alone(part: Callable[[], Found]) -> tuple[Found | None, Record | None]:
    """What ``part`` makes, in which no rank waits for others; or, on all ranks, why it failed on one of them."""
    found, fault = None, None
    try:
        found = part()
    except Exception as error:
        # Of any kind, for example too little memory: other cases are measured nevertheless.
        fault = failure(error)
    return found, next((one for one in _gathered(fault) if one is not None), None)


def _gathered(of_rank: Found) -> list[Found]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, of_rank)
    return everyone
