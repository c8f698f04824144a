"""The models that whole steps are measured on, their tokens, and whether their logits are right."""

import contextlib
import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.configuration_fox import DEFAULT_EPS
from foxlm.modeling.layers.forget_gate import FoxForgetGate

from ..gates import RULES
from ..loading import DTYPES, load_model, load_tokenizer, model_name
from ..skipped_share import skipped_share
from ..text import check_tokens
from ..text import rows as rows_of_text
from .results import Row

PRESET = "pro-760m"
# Sizes for a CPU, where it only shows that all parts work.
CPU_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Decay times in tokens, the range of the many and of the few.
_SHORT, _LONG = (1.0, 100.0), (1e3, 1e6)
_SHARE_LONG = 0.2
# How much worse than bfloat16 with dense attention results may be.
FACTOR = 4.0
# Context of the check, which has a dense reference.
CHECKED_TOKENS = 512


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
    preset: str = PRESET
    sizes: tuple[tuple[str, Any], ...] = ()
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
            return build_fox(self.preset, dict(self.sizes), self.device, dtype)
        name = next(name for name, known in DTYPES.items() if known == dtype)
        model = load_model(self.model, device=self.device, dtype=name)
        if not isinstance(model, FoxForCausalLM):
            raise ValueError(
                f"--model must be a FoX language model, got {type(model).__name__} in {self.model}; foxlm graft makes "
                "a FoX of many others"
            )
        # The benchmark chooses the cache itself.
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
        check_tokens(int(ids.min()), int(ids.max()), vocabulary, str(self.text))
        return ids.to(self.device)

    def _rows(self, tokens: int, count: int) -> list[np.ndarray]:
        assert self.model is not None and self.text is not None
        tokenizer = None
        if self.text.suffix != ".npy" and self.text.exists():
            # A folder of .npy files needs no tokenizer; of anything else `documents` says what is wrong.
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


def spread_decay_times(heads: int) -> Tensor:
    """``[heads]`` float64 decay times in tokens, ascending.

    A fifth of the heads, at least one, forgets in 1e3 to 1e6 tokens and the others in 1 to 100, evenly spread in the
    logarithm: with random times the computed tiles would differ by percents from seed to seed.
    """
    long = max(1, int(_SHARE_LONG * heads))

    def spread(low: float, high: float, count: int) -> Tensor:
        return low * (high / low) ** ((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1))

    return torch.cat([spread(*_SHORT, heads - long), spread(*_LONG, long)])


def build_fox(preset: str, sizes: dict[str, Any], device: str, dtype: torch.dtype = torch.float32) -> FoxForCausalLM:
    """A new FoX with its gates, always float32, around the benchmark's decay times."""
    # On the device itself: billions of random numbers take a CPU a minute.
    with torch.device(device):
        model = FoxForCausalLM._from_config(FoxConfig.preset(preset, **sizes), dtype=dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FoxForgetGate):
                times = spread_decay_times(module.bias.numel())
                module.bias.copy_(-torch.log(torch.expm1(1.0 / times)))
    return model


def build_llama(config: FoxConfig, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A new Llama of transformers with the sizes of ``config``."""
    heads, kv_heads, head_dim = config.heads
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    llama = LlamaConfig(
        **{name: getattr(config, name) for name in same},
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return LlamaForCausalLM._from_config(llama, dtype=dtype, attn_implementation="sdpa").to(device)


def ours(rule: Rule | None) -> str:
    """What this library is called in tables."""
    return "foxlm" if rule is None else f"foxlm, ACP {rule}"


def rules_of(config: FoxConfig) -> tuple[Rule | None, ...]:
    """How a model can be pruned: not at all without gates."""
    return (None,) if config.forget_gate == "none" else (None, *RULES)


def set_pruning(model: PreTrainedModel, rule: Rule | None) -> None:
    """Have every layer of ``model`` prune by ``rule``, or not."""
    model.config.acp_eps = None if rule is None else DEFAULT_EPS
    if rule is not None:
        model.config.acp_rule = rule


def computed_tiles(model: FoxForCausalLM, ids: Tensor, rule: Rule | None) -> float:
    """Computed-tile fraction of causal attention over ``ids``, ``[B, T]``, in all layers and heads."""
    set_pruning(model, rule)
    # One sequence at a time, which needs the least memory.
    skipped = [skipped_share(model, {"input_ids": row}) for row in ids.split(1)]
    return 1.0 - sum(0.0 if one is None else one.item() for one in skipped) / len(skipped)


def fault_of(what: str, error: float, limit: float) -> str | None:
    """``what`` with how far it is off, in words; None within the limit, which a NaN never is."""
    return None if error <= limit else f"{what} off by {error:.1e}, {limit:.1e} allowed"


class LogitsCheck:
    """Compares logits of models on the same tokens with those of dense attention in float32."""

    def __init__(self) -> None:
        self._references: dict[tuple[str, int, bytes], tuple[Tensor, float]] = {}

    def fault(
        self, family: str, model: PreTrainedModel, ids: Tensor, found: Tensor, *, eps: float, row: Row
    ) -> str | None:
        """What is wrong, in words; None if nothing is. Adds ``error`` and ``limit`` to ``row``.

        Args:
            family: of the model: those of one family share references.
            model: in bfloat16.
            ids: ``[B, T]`` tokens.
            found: ``[B, N, V]`` logits of the last ``N`` of them.
            eps: attention weight that pruning may take from each row.
            row: of what is checked.
        """
        key = (family, found.shape[1], ids.cpu().numpy().tobytes())
        if key not in self._references:
            self._references[key] = dense_logits(model, ids, found.shape[1])
        exact, rounding = self._references[key]
        error = largest_error(found, exact)
        limit = FACTOR * (rounding + eps)
        row |= {"error": error, "limit": limit}
        return fault_of("logits are", error, limit)


@torch.no_grad()
def dense_logits(model: PreTrainedModel, ids: Tensor, count: int) -> tuple[Tensor, float]:
    """Logits of the last ``count`` tokens by dense attention without a cache.

    Returns:
        ``[B, count, V]`` float32, and the `largest_error` of the same in the model's bfloat16.
    """
    config = copy.deepcopy(model.config)
    if isinstance(model, FoxForCausalLM):
        config.acp_eps = None
    results = []
    for dtype in (torch.float32, model.dtype):
        # A new model: one that has generated may hold what cannot be copied.
        with torch.device(model.device):
            dense = type(model)._from_config(config, dtype=dtype, attn_implementation="eager").eval()
        dense.load_state_dict(model.state_dict())
        results.append(dense(input_ids=ids, use_cache=False, logits_to_keep=count).logits)
        del dense
    exact, rounded = results
    return exact, largest_error(rounded, exact)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest ``|found - exact| / |exact|`` of any token, over logits ``[B, T, V]``; NaN if ``found`` has one."""
    exact = exact.double()
    return ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
