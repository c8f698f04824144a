"""What whole models are measured on: a preset with drawn gates and tokens, or a trained model and real text."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.evaluation.loading import DTYPES, load_model, load_tokenizer, model_name
from foxlm.evaluation.text import rows as rows_of_text
from foxlm.kernels.pruning.rules import Rule

from .implementations import RULES
from .models import Sizes, build_fox


@dataclass(frozen=True)
class Workload:
    """A FoX, and the tokens it is given.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        preset: of `FoxConfig.preset`, for a new model whose gates forget as the benchmark's do, on random tokens.
        sizes: fields of the configuration that differ from the preset.
        model: folder or name of a FoX model to measure instead, with the gates that it has learned.
        text: what it reads, as for `foxlm.evaluation.text`.
        join: whether short documents are put together.
        seed: of weights and tokens.
    """

    device: str
    preset: str = "pro-760m"
    sizes: Sizes = ()
    model: str | None = None
    text: Path | None = None
    join: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) != (self.text is None):
            given, lacking = ("--text", "--model") if self.model is None else ("--model", "--text")
            raise ValueError(f"--model and --text go together, got {given} without {lacking}")

    def build(self, dtype: torch.dtype) -> FoxForCausalLM:
        """The model, with its gates in float32 and all other weights in ``dtype``.

        Raises:
            ValueError, OSError: the model cannot be read, or is no FoX.
        """
        if self.model is None:
            torch.manual_seed(self.seed)
            return build_fox(self.preset, self.sizes, self.device, dtype)
        name = next(name for name, known in DTYPES.items() if known == dtype)
        model = load_model(self.model, device=self.device, dtype=name)
        if not isinstance(model, FoxForCausalLM):
            raise ValueError(
                f"--model must be a FoX language model, got {type(model).__name__} in {self.model}; foxlm graft makes "
                "a FoX of many others"
            )
        # Which caches free what is decided by what is measured.
        model.config.free_dead_cache = False
        return model

    def ids(self, vocabulary: int, batch: int, tokens: int, repeat: bool = True) -> Tensor:
        """``[batch, tokens]`` int64: random, or rows of the text.

        Args:
            vocabulary: size of the model's vocabulary.
            batch: sequences.
            tokens: of each.
            repeat: take rows of the text more than once if there are fewer.

        Raises:
            ValueError, OSError: the text cannot be read, or has no row as long, or not enough of them.
        """
        if self.model is None:
            generator = torch.Generator(self.device).manual_seed(self.seed)
            return torch.randint(vocabulary, (batch, tokens), generator=generator, device=self.device)
        found = self._rows(tokens, batch)
        if len(found) < batch and not repeat:
            raise ValueError(f"{self.text} has {len(found)} rows of {tokens} tokens, got {batch} as --rows")
        ids = torch.from_numpy(np.stack(list(itertools.islice(itertools.cycle(found), batch))))
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"{self.text} must hold tokens below {vocabulary}, the model's, got {int(ids.max())}")
        return ids.to(self.device)

    def _rows(self, tokens: int, count: int) -> list[np.ndarray]:
        assert self.model is not None and self.text is not None
        tokenizer = None
        if self.text.suffix != ".npy" and self.text.exists():
            # What transformers says of a folder without one has many lines. A folder of .npy files needs none, and of
            # anything else `documents` says what is wrong.
            with contextlib.suppress(OSError, ValueError):
                tokenizer = load_tokenizer(self.model)
        try:
            return list(rows_of_text(self.text, tokenizer, tokens, count, self.join))
        except ValueError as error:
            hint = "" if self.join else " (--join)"
            raise ValueError(f"{error}{hint}" if "in a row" in str(error) else str(error)) from None

    def facts(self) -> dict[str, Any]:
        """``preset``, as ``changed`` what differs from it, if anything; or ``model`` and ``text`` by name."""
        if self.model is None or self.text is None:
            return {"preset": self.preset} | ({"changed": dict(self.sizes)} if self.sizes else {})
        return {"preset": None, "model": model_name(self.model), "text": self.text.name}


def distinct_rows(ids: Tensor) -> int:
    """How many of the sequences ``[B, T]`` differ."""
    return len(torch.unique(ids, dim=0))


def rules_of(config: FoxConfig) -> Sequence[Rule | None]:
    """How a model can be pruned: not at all without gates."""
    return (None,) if config.forget_gate == "none" else (None, *RULES)
