"""Compile kernels before they are launched, side by side.

Triton compiles a kernel when it is launched for the first time, and the launch waits. A first forward and backward pass
launches 16 kernels, so here they are found before, by going through the same code with launches left out: what Triton
calls a warm-up of a kernel. Triton's `AsyncCompileMode` then compiles them in threads, whose work is nearly all done
without Python's lock. A launch waits for its own kernel only, so backward's are compiled while forward runs.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from .decay import Decay, accumulate
from .devices import capability_of
from .elementwise.triton_attention_sink import add_sink
from .operators import may_launch
from .portable.scan import sum_gates
from .pruning.prune import prune
from .pruning.rules import Rule, centered, key_center
from .pruning.search import search_kv_start
from .tiles import PRUNED_KEYS
from .triton_attention import triton_attention
from .triton_common import INTERPRETED

# Tokens that stand for all: kernels are the same for any number, but for so few that there is nothing to prune.
_TOKENS = PRUNED_KEYS + 1
_patching = threading.RLock()
_prepared: set[tuple[Any, ...]] = set()


class _LeavingOut(threading.local):
    now = False


_leaving_out = _LeavingOut()


class _Kernel:
    """A kernel that is being compiled; whatever is asked of it waits until it has been."""

    def __init__(self, future: "Future[Any]", finalize: Callable[[Any], None]) -> None:
        self._future, self._finalize = future, finalize

    def __getattr__(self, name: str) -> Any:
        kernel = self._future.result()
        # From now on Triton finds the kernel itself.
        self._finalize(kernel)
        return getattr(kernel, name)


class _InBackground(triton.AsyncCompileMode):
    """As Triton's, but leaving it waits for nothing: launches do, for what they need.

    Args:
        executor: where kernels are compiled.
        load: called there with each of them.
    """

    def __init__(self, executor: Executor, load: Callable[[Any], None]) -> None:
        super().__init__(executor)
        self._load = load
        self.futures: list[Future[Any]] = []

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Any:
        def compile_and_load() -> Any:
            kernel = compile_fn()
            self._load(kernel)
            return kernel

        if key not in self.future_kernels:
            future = self.executor.submit(compile_and_load)
            self.futures.append(future)
            self.future_kernels[key] = _Kernel(future, finalize_fn)
            # Triton 3.6 would enter it among the device's kernels only when it is done.
            finalize_fn(self.future_kernels[key])
        return self.future_kernels[key]


@contextlib.contextmanager
def launches_left_out(load: Callable[[Any], None] = lambda kernel: None) -> Iterator[list["Future[Any]"]]:
    """Within, this thread's launches begin to compile a kernel in the background and do nothing else.

    Results are what was in memory: what the host reads of them, such as counts of pages, must be written before.

    Args:
        load: called with each compiled kernel where it was compiled.

    Yields:
        What has begun; results are compiled kernels.
    """

    def run_or_compile(self: JITFunction, *args: Any, **options: Any) -> Any:
        # Other threads launch as ever.
        if _leaving_out.now:
            options["warmup"] = True
        return run(self, *args, **options)

    executor = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "compile-kernels")
    with _patching:
        run = JITFunction.run
        # Triton itself has a warm-up of one launch that is written out as such.
        JITFunction.run = run_or_compile
        _leaving_out.now = True
        try:
            # Backward passes in this thread too.
            with torch.autograd.set_multithreading_enabled(False), _InBackground(executor, load) as mode:
                yield mode.futures
        finally:
            _leaving_out.now = False
            JITFunction.run = run
            executor.shutdown(wait=False)


def prepare_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    eps: float | None = None,
    rule: Rule = "tight",
    logit_bound: float | Tensor | Callable[[], Tensor | None] | None = None,
    dropout: float = 0.0,
    center: bool = False,
    has_sink: bool = False,
) -> None:
    """Begin to compile what `forgetting_attention` and its gradients will launch; the first call with such inputs does.

    Arguments as for `forgetting_attention`, whose results do not depend on this. ``logit_bound`` may be a function, and
    ``center`` says that the search for what may be left out is given `centered` keys, ``has_sink`` that there is an
    attention sink.
    """
    if torch.compiler.is_compiling() or INTERPRETED:
        return
    inputs = (q, k, v, log_f)
    needed = tuple(x.requires_grad for x in inputs) if torch.is_grad_enabled() else ()
    options = (eps is None, rule, logit_bound is None, center, has_sink, dropout > 0.0)
    key = (q.device, q.dtype, log_f.dtype, q.shape[2:], k.shape[2], log_f.shape[2], *options, needed)
    if key in _prepared or not _can_prepare(inputs):
        return
    _prepared.add(key)
    if callable(logit_bound):
        logit_bound = logit_bound()
    if isinstance(logit_bound, Tensor):
        logit_bound = logit_bound.detach().expand(q.shape[0], q.shape[2])[:1]

    def load(kernel: Any) -> None:
        # Its launcher is made, and its code copied to the GPU.
        if q.is_cuda:
            with torch.cuda.device_of(q):
                kernel.run  # noqa: B018 (a property that does so)

    random = torch.random.fork_rng([q.device] if q.is_cuda else [])
    with random, torch.set_grad_enabled(any(needed)), torch.cuda.device_of(q), launches_left_out(load):
        _attend(inputs, eps, rule, logit_bound, dropout, center, has_sink)


def _can_prepare(inputs: tuple[Tensor, ...]) -> bool:
    if _leaving_out.now or capability_of(inputs[0]) is None or min(x.shape[1] for x in inputs) < _TOKENS:
        return False
    # Loading what was compiled would spoil a capture.
    return may_launch(*inputs) and not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _attend(
    inputs: tuple[Tensor, ...],
    eps: float | None,
    rule: Rule,
    logit_bound: float | Tensor | None,
    dropout: float,
    center: bool,
    has_sink: bool,
) -> None:
    """What `forgetting_attention` does, on the first tokens of one sequence, and its backward pass."""
    parts = [x.detach()[:1, :_TOKENS].requires_grad_(x.requires_grad) for x in inputs]
    q, k, v, log_f = parts
    c, kv_start = accumulate(log_f, sum_gates=sum_gates)
    decay = Decay(c, c, kv_start, torch.arange(_TOKENS, device=q.device))
    scale = q.shape[-1] ** -0.5
    sink = k.new_zeros(k.shape[2:]) if has_sink else None
    if eps is not None:
        options: dict[str, Any] = {"eps": eps, "rule": rule, "logit_bound": logit_bound, "search": search_kv_start}
        if sink is not None:
            options["sink"] = sink - key_center(k)[:, 0] if center else sink
        decay = prune(decay, q, centered(k) if center else k, scale=scale, **options)
    out, lse = triton_attention(q, k, v, decay, scale=scale, dropout=dropout)
    if sink is not None:
        out, _ = add_sink(out, lse, q, sink, sink, scale)
    if torch.is_grad_enabled():
        torch.autograd.grad(out, [x for x in parts if x.requires_grad], torch.empty_like(out))
