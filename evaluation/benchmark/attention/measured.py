"""`foxlm bench attention`: one attention layer, forward and backward, beside baselines."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from foxlm.modeling.configuration_fox import DEFAULT_EPS, DEFAULT_LOG_EPS

from ...gates import decay_of, search
from ..results import Row
from ..runner import MissingError, Variant
from ..timing import Matmul, device_times, peak_bytes
from .correctness import Gradients, Reference, Sample
from .implementations import Implementation, defined_tiles
from .inputs import Case, Inputs, make_inputs

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


def synthetic(
    case: Case, implementations: Sequence[Implementation], device: str, dtype: torch.dtype, seed: int = 0
) -> Iterator[Variant]:
    """The variants of one shape; of this library also where nothing can be pruned, which shows what pruning costs.

    That is held against what does not prune on the same gates: with others even the dense kernels take another time.
    """
    inputs = make_inputs(case, device, dtype, seed)
    yield from variants(case, inputs, implementations, seed)
    if case != LONG_CASE:
        of_library = [one for one in implementations if one.is_ours]
        if any(one.rule is not None for one in of_library):
            yield from variants(case, inputs.open(), of_library, seed, open_gates=True)


def variants(
    case: Case, inputs: Inputs, implementations: Sequence[Implementation], seed: int = 0, open_gates: bool = False
) -> Iterator[Variant]:
    """A variant for each of ``implementations``, and before them a large matmul to compare rates with.

    Args:
        case: shape of ``inputs``.
        inputs: of all implementations.
        implementations: what is measured.
        seed: of the rows that are checked.
        open_gates: the gates of ``inputs`` are open, which rows then say; there is no matmul.
    """
    facts: Row = {"case": str(case), "kv_heads": case.kv_heads or case.heads}
    facts |= {"open_gates": True} if open_gates else {}
    ceiling = None if open_gates else _Ceiling(facts, inputs.layer.q.device.type, inputs.layer.q.dtype)
    if ceiling is not None:
        # What was compiled for other shapes would count against the limit of recompilations.
        torch.compiler.reset()
        yield ceiling
    sample = Sample.of(inputs, seed)
    references: dict[bool, Reference] = {}
    for one in implementations:
        if one.gated not in references:
            references[one.gated] = Reference(inputs if one.gated else inputs.open(), sample)
        yield _Attention(one, case, inputs, facts, references[one.gated], ceiling)


class _Ceiling:
    """The large matmul."""

    def __init__(self, facts: Row, device: str, dtype: torch.dtype) -> None:
        self.facts = {"name": "matmul"} | facts
        self.tflops: float | None = None
        self._device, self._dtype = device, dtype

    def check(self, row: Row) -> None:
        self._matmul = Matmul(self._device, self._dtype)

    def time(self, rounds: int) -> dict[str, list[float]]:
        return {"forward": device_times(self._matmul, rounds, self._device)}

    def derive(self, row: Row) -> None:
        self.tflops = row["forward"]["dense_tflops"] = self._matmul.flops / row["forward"]["ms"] / 1e9


class Calls:
    """Forward and backward pass of an implementation on inputs in the layout that it takes."""

    def __init__(self, implementation: Implementation, inputs: Inputs) -> None:
        layer = inputs.layer
        self._head_first = implementation.head_first
        self._attend = implementation.prepare(layer)
        q, k, v, self._dout = (self._laid_out(x) for x in (layer.q, layer.k, layer.v, inputs.dout))
        self._leaves = {"q": q, "k": k, "v": v, "log_f": layer.log_f.detach()}
        named = self._leaves.items()
        self._wanted = {name: x for name, x in named if name != "log_f" or implementation.gate_gradient}
        for leaf in self._wanted.values():
            leaf.requires_grad_()

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if self._head_first else x.detach()

    def forward(self) -> Tensor:
        """The forward pass as in training: what the backward pass needs is kept."""
        return self._attend(*self._leaves.values())

    def forward_backward(self) -> None:
        """A forward and a backward pass."""
        torch.autograd.grad(self.forward(), list(self._wanted.values()), self._dout)

    def results(self, dout: Tensor) -> Gradients:
        """``out`` and gradients for the output gradient ``dout``, tokens before heads whatever the layout inside."""
        out = self.forward()
        grads = torch.autograd.grad(out, list(self._wanted.values()), self._laid_out(dout))
        found = {"out": out.detach(), **dict(zip(self._wanted, grads, strict=True))}
        if self._head_first:
            found = {name: x if name == "log_f" else x.transpose(1, 2) for name, x in found.items()}
        return found


class _Attention:
    """One implementation on one set of inputs."""

    def __init__(
        self,
        one: Implementation,
        case: Case,
        inputs: Inputs,
        facts: Row,
        reference: Reference,
        ceiling: _Ceiling | None,
    ) -> None:
        name = one.name + (", open gates" if facts.get("open_gates") else "")
        self.facts = {"name": name, "rule": one.rule, "gated": one.gated, "gate_gradient": one.gate_gradient} | facts
        self._one, self._case, self._inputs, self._reference, self._ceiling = one, case, inputs, reference, ceiling
        self._device = inputs.layer.q.device.type
        self._calls: dict[str, Callable[[], object]] = {}

    def check(self, row: Row) -> str | None:
        one, layer = self._one, self._inputs.layer
        if one.needs_gpu and self._device != "cuda":
            raise MissingError("needs a GPU")
        calls = Calls(one, self._inputs)
        found = calls.results(self._reference.sample.only(self._inputs.dout))
        fault = self._reference.fault(found, 0.0 if one.rule is None else DEFAULT_EPS, row)
        del found
        row["computed_tiles"] = computed = one.computed_tiles(layer)
        self._calls = {"forward": calls.forward, "forward_backward": calls.forward_backward}
        if one.is_ours and one.rule is not None:
            rule, decay = one.rule, decay_of(layer)
            self._calls["search"] = lambda: search(layer, decay, DEFAULT_LOG_EPS, rule)
            expected = defined_tiles(layer, rule)
            if computed > expected + _EXTRA_TILES:
                fault = fault or f"computes {computed:.1%} of the tiles, where its rule leaves {expected:.1%}"
        if fault is None:
            row["peak_bytes"] = peak_bytes(calls.forward_backward, self._device, self._inputs.nbytes)
        return fault

    def time(self, rounds: int) -> dict[str, list[float]]:
        rounds = min(rounds, _MOST_ROUNDS_OF_LONG) if self._case == LONG_CASE else rounds
        return {part: device_times(call, rounds, self._device) for part, call in self._calls.items()}

    def derive(self, row: Row) -> None:
        for part in ("forward", "forward_backward"):
            dense = self._case.flops(part == "forward_backward") / row[part]["ms"] / 1e9
            row[part] |= {"dense_tflops": dense, "computed_tflops": dense * row["computed_tiles"]}
            if self._ceiling is not None and self._ceiling.tflops:
                row[part]["of_matmul"] = row[part]["computed_tflops"] / self._ceiling.tflops
