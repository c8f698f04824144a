"""`foxlm bench attention`: one attention layer, forward and backward, beside baselines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gates import decay_of, search
from .attentions import Implementation, defined_tiles
from .correctness import Gradients, Reference, Sample
from .inputs import EPS, LOG_EPS, Case, Inputs, make_inputs
from .results import Row
from .runner import MissingError, Variant
from .timing import Matmul, device_times, peak_bytes

# 32k tokens in sequences of 4k to 64k, fewer heads, and heads of 128.
CASES = (
    Case(8, 24, 64, 4096),
    Case(4, 24, 64, 8192),
    Case(2, 24, 64, 16384),
    Case(2, 12, 64, 16384),
    Case(2, 16, 128, 16384),
    Case(1, 24, 64, 65536),
)
# A million tokens, for pruning only: without, one pass would take seconds.
LONG_CASE = Case(1, 4, 64, 1 << 20)
CPU_CASE = Case(1, 4, 16, 256)

# Kernels may compute tiles that the definition drops, since they round toward safety, but not many.
_EXTRA_TILES = 0.02
_MOST_ROUNDS_OF_LONG = 3


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of queries, keys and values.
        seed: of the inputs and of the rows that are checked.
    """

    device: str
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def synthetic(case: Case, implementations: Sequence[Implementation], settings: Settings) -> Iterator[Variant]:
    """The variants of one shape; of this library also where nothing can be pruned, which shows what pruning costs."""
    inputs = make_inputs(case, settings.device, settings.dtype, settings.seed)
    yield from variants(case, inputs, implementations, settings, {})
    if case != LONG_CASE:
        pruned = [one for one in implementations if one.is_ours and one.rule is not None]
        yield from variants(case, inputs.open(), pruned, settings, {"open_gates": True}, matmul=False)


def variants(
    case: Case,
    inputs: Inputs,
    implementations: Sequence[Implementation],
    settings: Settings,
    facts: dict[str, Any],
    matmul: bool = True,
) -> Iterator[Variant]:
    """A variant for each of ``implementations``, and before them a large matmul to compare rates with."""
    facts = {"case": str(case), "kv_heads": case.kv_heads or case.heads} | facts
    ceiling = _Ceiling(facts, settings)
    if matmul:
        # What was compiled for other shapes would count against the limit of recompilations.
        torch.compiler.reset()
        yield ceiling
    checker = _Checker(inputs, settings.seed)
    for one in implementations:
        yield _Attention(one, case, inputs, settings, facts, checker, ceiling if matmul else None)


class _Ceiling:
    """The large matmul."""

    def __init__(self, facts: Row, settings: Settings) -> None:
        self.facts = {"name": "matmul"} | facts
        self.tflops: float | None = None
        self._settings = settings

    def check(self, row: Row) -> None:
        self._matmul = Matmul(self._settings.device, self._settings.dtype)

    def time(self, rounds: int) -> dict[str, list[float]]:
        return {"forward": device_times(self._matmul, rounds, self._settings.device)}

    def derive(self, row: Row) -> None:
        self.tflops = row["forward"]["dense_tflops"] = self._matmul.flops / row["forward"]["ms"] / 1e9


class _Checker:
    """References of the inputs, with their gates and without, each made when it is first needed."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        self.sample = Sample.of(inputs, seed)
        self._inputs = inputs
        self._references: dict[bool, Reference] = {}

    def reference(self, gated: bool) -> Reference:
        if gated not in self._references:
            self._references[gated] = Reference(self._inputs if gated else self._inputs.open(), self.sample)
        return self._references[gated]


class Calls:
    """Forward and backward pass of an implementation on inputs in the layout that it takes."""

    def __init__(self, implementation: Implementation, inputs: Inputs) -> None:
        layer = inputs.layer
        self._head_first = implementation.head_first
        self._attend = implementation.prepare(layer)
        q, k, v, self._dout = (self._laid_out(x) for x in (layer.q, layer.k, layer.v, inputs.dout))
        self._leaves = {"q": q, "k": k, "v": v, "log_f": layer.log_f.detach()}
        self._wanted = [name for name in self._leaves if name != "log_f" or implementation.gate_gradient]
        for name in self._wanted:
            self._leaves[name].requires_grad_()

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if self._head_first else x.detach()

    def forward(self) -> Tensor:
        """The forward pass as in training: what the backward pass needs is kept."""
        return self._attend(*self._leaves.values())

    def forward_backward(self) -> None:
        """A forward and a backward pass."""
        self._gradients(self.forward(), self._dout)

    def _gradients(self, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [self._leaves[name] for name in self._wanted], dout)

    def results(self, dout: Tensor) -> Gradients:
        """``out`` and gradients for the output gradient ``dout``, tokens before heads whatever the layout inside."""
        out = self.forward()
        grads = dict(zip(self._wanted, self._gradients(out, self._laid_out(dout)), strict=True))
        found = {"out": out.detach(), **grads}
        return {name: x.transpose(1, 2) for name, x in found.items()} if self._head_first else found


class _Attention:
    """One implementation on one set of inputs."""

    def __init__(
        self,
        implementation: Implementation,
        case: Case,
        inputs: Inputs,
        settings: Settings,
        facts: Row,
        checker: _Checker,
        ceiling: _Ceiling | None,
    ) -> None:
        one = implementation
        name = one.name + (", open gates" if facts.get("open_gates") else "")
        self.facts = {"name": name, "rule": one.rule, "gated": one.gated, "gate_gradient": one.gate_gradient} | facts
        self._one, self._case, self._inputs, self._settings = one, case, inputs, settings
        self._checker, self._ceiling = checker, ceiling
        self._calls: dict[str, Callable[[], object]] = {}

    def check(self, row: Row) -> str | None:
        one, inputs, device = self._one, self._inputs, self._settings.device
        missing = one.missing(device)
        if missing is not None:
            raise MissingError(missing)
        calls = Calls(one, inputs)
        found = calls.results(self._checker.sample.only(inputs.dout))
        fault = self._checker.reference(one.gated).fault(found, 0.0 if one.rule is None else EPS, row)
        del found
        row["computed_tiles"] = one.computed_tiles(inputs.layer)
        fault = fault or self._lost_pruning(row["computed_tiles"])
        if fault is None:
            row["peak_bytes"] = peak_bytes(calls.forward_backward, device, inputs.nbytes)
            self._calls = {"forward": calls.forward, "forward_backward": calls.forward_backward}
            if one.is_ours and one.rule is not None:
                rule, decay = one.rule, decay_of(inputs.layer)
                self._calls["search"] = lambda: search(inputs.layer, decay, LOG_EPS, rule)
        return fault

    def _lost_pruning(self, computed: float) -> str | None:
        if not self._one.is_ours or self._one.rule is None:
            return None
        expected = defined_tiles(self._inputs.layer, self._one.rule)
        if computed <= expected + _EXTRA_TILES:
            return None
        return f"computes {computed:.1%} of the tiles, where its rule leaves {expected:.1%}"

    def time(self, rounds: int) -> dict[str, list[float]]:
        rounds = min(rounds, _MOST_ROUNDS_OF_LONG) if self._case == LONG_CASE else rounds
        return {part: device_times(call, rounds, self._settings.device) for part, call in self._calls.items()}

    def derive(self, row: Row) -> None:
        for part in ("forward", "forward_backward"):
            dense = self._case.flops(part == "forward_backward") / row[part]["ms"] / 1e9
            row[part] |= {"dense_tflops": dense, "computed_tflops": dense * row["computed_tiles"]}
            if self._ceiling is not None and self._ceiling.tflops:
                row[part]["of_matmul"] = row[part]["computed_tflops"] / self._ceiling.tflops
