"""`foxlm bench context`: one attention layer whose sequence lies on several GPUs of this host, beside one GPU with all.

Of each case: every rank by itself computes output and gradients of the whole sequence, on inputs that all draw from the
same seed; all together compute them, each of its tokens, and are compared with the first, head by head; then both are
timed, in calls that begin on idle GPUs, and in several in a row without waiting, as a model's layers are called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from foxlm.kernels.context_parallel.api import context_parallel_attention
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.configuration_fox import DEFAULT_EPS

from ...recording import AttentionInputs
from ..models import fault_of
from ..ranks import gathered, slowest
from ..results import Results, Row
from ..runner import MissingError, Report, failure, run
from ..timing import device_times, synchronize
from .implementations import OURS, Attend, Implementation, pruning_options
from .inputs import Case, Inputs, make_inputs
from .measured import Calls

CASES, CPU_CASES = (Case(1, 24, 64, 131072),), (Case(1, 4, 16, 1024),)

# Calls that are queued without waiting; of a single call on idle GPUs, launches are a larger part.
IN_A_ROW = 6
_WARM_UP = 2
# Sums in float32 in another order; what a row may lose by pruning where tiles lie otherwise, with room.
_FLOAT32_SUMS, _EPS_FACTOR = 1e-5, 4.0
_PARTS = {"forward": "forward", "forward_backward": "fwd + bwd"}


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
        rounds: timed calls in each pass.
        seed: of the inputs.
        attend: what is measured, as `context_parallel_attention`; importable by name.
    """

    cases: tuple[Case, ...]
    gpus: int
    device: str
    dtype: torch.dtype
    rule: Rule | None
    split: str
    rounds: int
    seed: int
    attend: Callable[..., Tensor] = context_parallel_attention

    @property
    def limit(self) -> float:
        """Largest relative distance of a head's output or gradients from one GPU's: two roundings to the dtype."""
        pruning = 0.0 if self.rule is None else _EPS_FACTOR * DEFAULT_EPS
        return torch.finfo(self.dtype).eps + _FLOAT32_SUMS + pruning


def measure_on_rank(rank: int, recipe: ContextRecipe, results: Results, out: Path) -> None:
    """Measure with all other ranks; rank 0 adds rows to ``results`` and keeps them in ``out``."""
    report = Report(results, out if rank == 0 else None)
    context = ContextParallel(split=recipe.split)
    for case in recipe.cases:
        shared = _Case(case, recipe, context)
        run([_Part(part, shared) for part in _PARTS], report, recipe.rounds, recipe.device, collective=True)


class _Case:
    """Both ways to compute one case, and how far they are apart."""

    def __init__(self, case: Case, recipe: ContextRecipe, context: ContextParallel) -> None:
        self.case, self.recipe, self.context = case, recipe, context
        self.calls: dict[str, Calls] = {}

    @cached_property
    def compared(self) -> tuple[Row, str | None]:
        """What is found once for both parts, and what is wrong, in words. Makes the ``calls`` to time."""
        found, reason = None, None
        try:
            found = self._on_one()
        except Exception as error:
            # For example too little memory. No rank waits for others here, and other cases are still measured.
            reason = failure(error)["reason"]
        reason = next((one for one in gathered(reason) if one is not None), None)
        if found is None or reason is not None:
            raise MissingError(f"one GPU cannot compute it: {reason}")
        inputs, one, expected = found
        shards, layer = self.context.shards(self.case.tokens), inputs.layer
        q, k, v, log_f, dout = (shards.take(x) for x in (layer.q, layer.k, layer.v, layer.log_f, inputs.dout))
        part = Inputs(layer._replace(q=q, k=k, v=v, log_f=log_f), dout)
        together = Calls(self._shared(), part)
        row: Row = {}
        fault = compare(together, dout, {name: shards.take(x) for name, x in expected.items()}, self.recipe, row)
        row["traffic"] = self._traffic(together)
        self.calls = {"one": one, "together": together}
        return row, fault

    def _on_one(self) -> tuple[Inputs, Calls, dict[str, Tensor]]:
        """The whole sequence on this rank alone."""
        recipe = self.recipe
        # Random numbers need the number of the device.
        device = f"cuda:{self.context.rank}" if recipe.device == "cuda" else recipe.device
        inputs = make_inputs(self.case, device, recipe.dtype, recipe.seed)
        calls = Calls(next(one for one in OURS if one.rule == recipe.rule), inputs)
        return inputs, calls, calls.results(inputs.dout)

    def _shared(self) -> Implementation:
        """Attention of this rank's tokens to those of all."""

        def prepare(layer: AttentionInputs) -> Attend:
            options = {"context": self.context, "length": self.case.tokens, "scale": layer.scale}
            return partial(self.recipe.attend, **options, **pruning_options(self.recipe.rule, layer.logit_bound))

        return Implementation(f"on {self.recipe.gpus} GPUs", prepare, rule=self.recipe.rule)

    def _traffic(self, together: Calls) -> Row:
        """Bytes of one forward pass that all ranks receive."""
        traffic = self.context.traffic
        traffic.clear()
        together.forward()
        synchronize(self.recipe.device)
        moved, ring = (sum(of_rank) for of_rank in zip(*gathered((traffic.moved, traffic.ring)), strict=True))
        return {"moved": moved, "ring": ring, "share": moved / ring}


class _Part:
    """The forward pass, or forward and backward, of one case."""

    def __init__(self, part: str, shared: _Case) -> None:
        self.facts = {"name": _PARTS[part], "case": str(shared.case), "gpus": shared.recipe.gpus}
        self._part, self._shared = part, shared

    def check(self, row: Row) -> str | None:
        found, fault = self._shared.compared
        row |= found
        return fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {}
        for who, calls in self._shared.calls.items():
            call = getattr(calls, self._part)
            for name, count in ((who, 1), (f"{who}_in_a_row", IN_A_ROW)):
                own = [_ms_from_idle(call, count, self._shared.recipe.device) for _ in range(_WARM_UP + rounds)]
                times[name] = (fastest if who == "one" else slowest)(gathered(own[_WARM_UP:]))
        return times

    def derive(self, row: Row) -> None:
        row["speedup"] = row["one"]["ms"] / row["together"]["ms"]
        row["speedup_in_a_row"] = row["one_in_a_row"]["ms"] / row["together_in_a_row"]["ms"]


def compare(
    together: Calls, dout: Tensor, expected: Mapping[str, Tensor], recipe: ContextRecipe, row: Row
) -> str | None:
    """What is wrong with what all ranks compute together, in words.

    Adds to ``row`` the ``errors`` of each tensor relative to its norm, ``errors_of_heads``, each of its worst head,
    ``worst_error``, their ``limit``, and ``deterministic``, whether two runs gave the same bits.
    """
    first, second = (together.results(dout) for _ in range(2))
    # All ranks know what any of them has found, so that all go the same way.
    same = torch.tensor([int(all(torch.equal(first[name], second[name]) for name in first))], device=dout.device)
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    squares = torch.stack([_squares(first[name], right) for name, right in expected.items()])
    dist.all_reduce(squares)
    whole, of_heads = relative_errors(squares.cpu())
    worst = dict(zip(expected, of_heads.amax(1).tolist(), strict=True))
    row |= {"errors": dict(zip(expected, whole.tolist(), strict=True)), "errors_of_heads": worst}
    row |= {"worst_error": max(worst.values()), "limit": recipe.limit, "deterministic": bool(same)}
    for name, error in worst.items():
        what = "output" if name == "out" else f"gradient of {name}"
        if (fault := fault_of(f"{what} of the worst head is", error, recipe.limit)) is not None:
            return fault
    return None


def _squares(found: Tensor, right: Tensor) -> Tensor:
    """``[2, H]`` float64 sums of squares of this rank's errors, and of what is right."""
    both = torch.stack([found.float() - right.float(), right.float()])
    # Heads first; gates have no further dimension.
    return both.movedim(3, 1).flatten(2).double().square().sum(-1)


def relative_errors(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Distances relative to the norm: of each tensor, and of each of its heads.

    Heads that forget slowly have a small output, whose loss the whole would hardly show.

    Args:
        squares: ``[N, 2, H]`` sums of squares of the errors, and of what is right.

    Returns:
        ``[N]`` and ``[N, H]``; 0 where nothing is off, even from zeros.
    """

    def relative(off: Tensor, right: Tensor) -> Tensor:
        return torch.where(off == 0.0, 0.0, (off / right).sqrt())

    return relative(*squares.sum(-1).unbind(1)), relative(*squares.unbind(1))


def _ms_from_idle(call: Callable[[], object], count: int, device: str) -> float:
    """Milliseconds of a call, of ``count`` in a row, where all ranks begin with nothing left to do."""

    def row() -> None:
        for _ in range(count):
            call()

    dist.barrier()
    synchronize(device)
    return device_times(row, 1, device, warm_up=0)[0] / count


def fastest(of_ranks: list[list[float]]) -> list[float]:
    """Of calls that each rank makes by itself: those of the rank with the smallest sum."""
    return min(of_ranks, key=sum)
