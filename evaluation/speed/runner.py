"""One implementation on one set of inputs: run it, and hold it to the reference before it is timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .correctness import Gradients, Reference, Sample, check, reference
from .implementations import Implementation
from .inputs import Inputs
from .timing import peak_bytes, release_memory

# Kernels may keep tiles that the definition drops, for rounding toward safety, but not many.
_EXTRA_TILES = 0.02
# Compilers' errors can quote whole programs.
_LONGEST_DETAIL = 4000

Record = dict[str, Any]
"""What is known of an implementation, as it is written to JSON."""


class Runner:
    """An implementation with its inputs in the layout that it wants.

    Attributes:
        calls: what of it is timed, by the name under which the time is recorded.
    """

    def __init__(self, implementation: Implementation, inputs: Inputs) -> None:
        self._swap = implementation.head_first
        self._attend = implementation.prepare(inputs)
        q, k, v, self._dout = (self._laid_out(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        self._leaves = {"q": q, "k": k, "v": v, "log_f": inputs.log_f.detach()}
        self._wanted = [name for name in self._leaves if name != "log_f" or implementation.gate_gradient]
        for name in self._wanted:
            self._leaves[name].requires_grad_()
        self.calls: dict[str, Callable[[], object]] = {
            "forward": self.forward,
            "forward_backward": self.forward_backward,
        }
        if implementation.boundaries is not None:
            self.calls["boundaries"] = implementation.boundaries(inputs)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if self._swap else x.detach()

    def forward(self) -> Tensor:
        """The forward pass as in training: what the backward pass needs is kept."""
        return self._attend(*self._leaves.values())

    def forward_backward(self) -> None:
        """A forward and a backward pass."""
        self._gradients(self.forward(), self._dout)

    def _gradients(self, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [self._leaves[name] for name in self._wanted], dout)

    def results(self, dout: Tensor) -> tuple[Tensor, Gradients]:
        """Output and gradients for the output gradient ``dout``, heads after tokens, whatever the layout inside."""
        out = self.forward()
        grads = dict(zip(self._wanted, self._gradients(out, self._laid_out(dout)), strict=True))
        results = {"out": out.detach(), **grads}
        if self._swap:
            results = {name: x.transpose(1, 2) for name, x in results.items()}
        return results.pop("out"), results


class Bench:
    """Admits implementations to timing on one set of inputs.

    Attributes:
        records: of every implementation that was asked for, in that order; `status` is `measured` for those admitted,
            else `wrong`, `missing` or `failed`, with a `reason` in one line (and a `detail` where it failed).
        runners: those that were admitted, by name.
    """

    def __init__(self, inputs: Inputs, device: str, seed: int) -> None:
        self.records: list[Record] = []
        self.runners: dict[str, Runner] = {}
        self._inputs, self._device = inputs, device
        self._sample = Sample.of(inputs, seed)
        self._references: dict[bool, Reference] = {}

    def admit(self, implementation: Implementation) -> Record:
        """Check an implementation. What it raises becomes part of its record."""
        record: Record = {"name": implementation.name, "rule": implementation.rule}
        record |= {"gated": implementation.gated, "gate_gradient": implementation.gate_gradient}
        self.records.append(record)
        missing = implementation.missing(self._device)
        if missing is not None:
            record |= {"status": "missing", "reason": missing}
            return record
        try:
            self._examine(implementation, record)
        except Exception as error:
            # Of any kind: one competitor that does not compile or fit must not end the others.
            record |= failure(error)
        release_memory(self._device)
        return record

    def _examine(self, implementation: Implementation, record: Record) -> None:
        runner = Runner(implementation, self._inputs)
        out, grads = runner.results(self._sample.only(self._inputs.dout))
        result = check(out, grads, self._sample, self._reference(implementation.gated), implementation.eps)
        del out, grads
        record |= {"errors": result.errors, "limits": result.limits}
        record["tiles_kept"] = implementation.tiles_kept(self._inputs)
        fault = result.fault or self._lost_pruning(implementation, record["tiles_kept"])
        if fault is not None:
            record |= {"status": "wrong", "reason": fault}
            return
        release_memory(self._device)
        record["peak_bytes"] = peak_bytes(runner.forward_backward, self._device, self._inputs.nbytes)
        record["status"] = "measured"
        self.runners[implementation.name] = runner

    def _reference(self, gated: bool) -> Reference:
        if gated not in self._references:
            self._references[gated] = reference(self._inputs, self._sample, gated)
        return self._references[gated]

    def _lost_pruning(self, implementation: Implementation, kept: float) -> str | None:
        if implementation.tiles_expected is None:
            return None
        expected = implementation.tiles_expected(self._inputs)
        if kept <= expected + _EXTRA_TILES:
            return None
        return f"keeps {kept:.1%} of the tiles, where its rule keeps {expected:.1%}"


def failure(error: Exception) -> Record:
    """The part of a record that says what was raised."""
    detail = f"{type(error).__name__}: {error}".strip()
    return {"status": "failed", "reason": detail.splitlines()[0], "detail": detail[:_LONGEST_DETAIL]}
