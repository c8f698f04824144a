"""`foxlm bench generate`: which calls are measured, in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from foxlm.modeling.configuration_fox import FoxConfig

from . import train
from .attention.implementations import with_names
from .cold_start import STARTS, Start, start_variants
from .generation import CALLS, CPU_TOKENS, DECODE_TOKENS, PROMPTS, Call, Models, call_variants
from .models import Workload
from .results import PASSES
from .runner import Variant
from .timing import release_memory


@dataclass(frozen=True)
class Training:
    """A training step with the pruning that the configuration says.

    Attributes:
        compiled: whether layers and loss are compiled.
    """

    compiled: bool = False

    @property
    def name(self) -> str:
        """As it appears in rows, after the part."""
        return "train: foxlm" + (", compiled" if self.compiled else "")

    @property
    def against(self) -> dict[str, str]:
        """As of `Call`."""
        return {} if self.compiled else {"own": replace(self, compiled=True).name}


Measured = Call | Start | Training
MEASURED: tuple[Measured, ...] = (*CALLS, *STARTS, Training(), Training(compiled=True))


def chosen(
    names: Sequence[str], *, quick: bool = False, compiled: bool | None = None, part: str | None = None
) -> list[Measured]:
    """What is measured.

    Args:
        names: parts of names; all for none.
        quick: without names, leave out new processes, training and what is compiled.
        compiled: whether what is compiled is measured; by default with names, and where it is not ``quick``.
        part: the only one that counts.

    Raises:
        ValueError: one of ``names`` is part of no name, or nothing is left.
    """
    found = with_names([one for one in MEASURED if one.name.startswith(part or "")], names)
    if quick and not names:
        found = [one for one in found if isinstance(one, Call)]
    if not (bool(names) or not quick if compiled is None else compiled):
        found = [one for one in found if not getattr(one, "compiled", False)]
    if not found:
        raise ValueError("--no-compile leaves nothing of --only to measure")
    return found


def usable(config: FoxConfig, measured: Sequence[Measured]) -> list[Measured]:
    """Those of ``measured`` that differ for a FoX of ``config``, which may have no forget gates or captured graphs.

    Raises:
        ValueError: none is left.
    """
    gated, captures = config.forget_gate != "none", hasattr(config, "decoding_graphs")

    def differs(one: Measured) -> bool:
        return not isinstance(one, Call) or (
            (one.graphs or captures) and (gated or (one.pruned and one.cache != "paged"))
        )

    found = [one for one in measured if differs(one)]
    if not found:
        lacks = "captured graphs (a field decoding_graphs)" if gated else "forget gates (forget_gate is none)"
        raise ValueError(f"the FoX has no {lacks}, so nothing is left of --only to measure")
    return found


@dataclass(frozen=True)
class Sizes:
    """Of the calls. None and empty ones are those of the benchmark.

    Attributes:
        new: tokens that are decoded.
        chunk: tokens of a chunk of a prompt.
        tokens: tokens of contexts, prompts and of a training step (the most of them).
        batches: sequences at a time.
    """

    new: int
    chunk: int
    tokens: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()

    def contexts(self, device: str) -> Iterator[tuple[str, int, int]]:
        """Part, batch and tokens of each group of calls."""
        usual = (DECODE_TOKENS,) if device == "cuda" else (CPU_TOKENS,)
        for tokens in self.tokens or usual:
            for batch in self.batches or (1, 8):
                yield "decode", batch, tokens
        prompts: tuple[tuple[int, int], ...] = PROMPTS if device == "cuda" else ((1, CPU_TOKENS),)
        if self.tokens or self.batches:
            prompts = tuple((x, y) for x in self.batches or (1,) for y in self.tokens or (max(prompts)[1],))
        for batch, tokens in prompts:
            yield "prefill", batch, tokens

    def of_training(self, device: str) -> int:
        """Tokens of a step."""
        return max(self.tokens or (train.TOKENS if device == "cuda" else train.CPU_TOKENS,))


def groups(
    measured: Sequence[Measured], models: Models, workload: Workload, sizes: Sizes
) -> Iterator[tuple[Iterator[Variant], int]]:
    """Variants that are timed in turn, and in how many passes. ``models`` is emptied before those that need room."""
    calls = [one for one in measured if isinstance(one, Call)]
    for part, batch, tokens in sizes.contexts(workload.device):
        of_group = [one for one in calls if one.part == part]
        if part == "decode" and not sizes.batches:
            of_group = [one for one in of_group if batch in one.batches]
        if of_group:
            yield call_variants(of_group, models, workload, batch, tokens, sizes.new, sizes.chunk), PASSES
    config: Any = models["foxlm"].config
    models.clear()
    torch.compiler.reset()
    release_memory(workload.device)
    starts = [one for one in measured if isinstance(one, Start)]
    if starts:
        yield start_variants(starts, workload), 1
    steps = [one for one in measured if isinstance(one, Training)]
    if steps:
        yield _training(steps, config, workload, sizes.of_training(workload.device)), PASSES


def _training(steps: Sequence[Training], config: FoxConfig, workload: Workload, tokens: int) -> Iterator[Variant]:
    rule = None if config.acp_eps is None or config.forget_gate == "none" else config.acp_rule
    recipe = train.Recipe(workload, tokens, compiled=any(one.compiled for one in steps))
    variants = train.variants(recipe, [train.Step(rule, one.compiled) for one in steps])
    for one, variant in zip(steps, variants, strict=True):
        variant.facts |= {"part": "train", "name": one.name, "against": one.against, "batch": 1, "tokens": tokens}
        yield variant
