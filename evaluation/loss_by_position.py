"""Loss of a language model by the position of the token that is predicted: how much a longer context helps it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foxlm.kernels.argument_types import typed
from foxlm.modeling.cache.paged import FoxPagedCache
from foxlm.modeling.versions import CACHE, cache_of

from .text import check_tokens

_LOGITS_AT_ONCE = 4096


@typed
def loss_by_position(model: nn.Module, rows: Tensor, chunk: int = 0) -> Tensor:
    """Negative log-likelihood of each token given all before it in its row, in nats.

    Args:
        model: a causal language model.
        rows: ``[N, T]`` int64 tokens, without padding.
        chunk: as of `row_losses`.

    Returns:
        ``[N, T - 1]`` float32 on the CPU; entry ``t`` is of token ``t + 1``.
    """
    return torch.stack(list(row_losses(model, rows, chunk)))


@typed
def row_losses(model: nn.Module, rows: Iterable[Tensor], chunk: int = 0) -> Iterator[Tensor]:
    """`loss_by_position`, a row at a time: one row is in memory, and the logits of some of its tokens.

    Args:
        model: a causal language model.
        rows: ``[T]`` int64 tokens each, T at least 2, without padding.
        chunk: tokens that the model takes in at once, the earlier ones in a cache: one that frees what is forgotten
            if the configuration says so (``free_dead_cache``). 0 is a row in one pass without a cache, which for most
            models takes less memory: keys and values of all layers are larger than what one layer computes.

    Yields:
        ``[T - 1]`` float32 on the CPU.

    Raises:
        ValueError: ``chunk`` is negative, or a token is none of the model's.
    """
    if chunk < 0:
        raise ValueError(f"chunk must be 0 (a row in one pass) or a number of tokens, got {chunk}")
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    # PEFT's too, which is no `PreTrainedModel`.
    model = cast(PreTrainedModel, model)
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    for index, row in enumerate(rows):
        check_tokens(int(row.min()), int(row.max()), vocabulary, "rows")
        if index == 0 and not chunk and not _logits_are_the_heads(model, row):
            # Scaled or capped behind the head: only the model itself knows.
            chunk = _LOGITS_AT_ONCE
        yield _losses(model, row, chunk)


@torch.no_grad()
def _losses(model: PreTrainedModel, row: Tensor, chunk: int) -> Tensor:
    parts = _logits(model, row.to(model.device), chunk)
    return torch.cat([nn.functional.cross_entropy(x.float(), target, reduction="none") for x, target in parts]).cpu()


def _logits(model: PreTrainedModel, row: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and the tokens that they predict, at most `_LOGITS_AT_ONCE` at a time."""
    targets = row[1:]
    if not chunk:
        head = model.get_output_embeddings()
        states = model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        parts = zip(states.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True)
        yield from ((head(state), target) for state, target in parts)
        return
    cache = new_cache(model, len(row))
    # The last token predicts nothing.
    for part, target in zip(row[:-1].split(chunk), targets.split(chunk), strict=True):
        out = model(input_ids=part[None], use_cache=True, **{CACHE: cache})
        cache = cache_of(out)
        yield from zip(out.logits[0].split(_LOGITS_AT_ONCE), target.split(_LOGITS_AT_ONCE), strict=True)


def new_cache(model: PreTrainedModel, length: int) -> Any:
    """A cache for ``length`` tokens of the kind that `generate` would take; None where the model makes its own."""
    if getattr(model.config, "free_dead_cache", False):
        return FoxPagedCache(model.config, max_cache_len=length)
    return None


@torch.no_grad()
def _logits_are_the_heads(model: PreTrainedModel, row: Tensor) -> bool:
    few = row[None, :8].to(model.device)
    states = model.base_model(input_ids=few, use_cache=False).last_hidden_state
    expected = model(input_ids=few, use_cache=False).logits
    # The same operations on the same numbers: a unit in the last place at most.
    near = max(torch.finfo(expected.dtype).eps, 1e-5)
    return torch.allclose(model.get_output_embeddings()(states), expected, rtol=near, atol=near, equal_nan=True)


def bootstrap_means(values: Tensor, seed: int = 0, samples: int = 1000) -> Tensor:
    """Means of ``values``, ``[N, M]``, over N rows with the 95% interval of a bootstrap that draws whole rows.

    Returns:
        ``[3, M]`` float64: means, lower and upper ends. With one row the ends are the mean.
    """
    values = values.double()
    drawn = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(seed))
    means = torch.stack([column[drawn].mean(1) for column in values.unbind(1)], dim=1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.cat([values.mean(0, keepdim=True), means.quantile(ends, dim=0)])


@typed
def by_interval(losses: Tensor, edges: Sequence[int], seed: int = 0, samples: int = 1000) -> list[dict[str, float]]:
    """Mean losses between positions, with the 95% interval of a bootstrap over rows.

    Args:
        losses: ``[N, T - 1]`` of `loss_by_position`; or the difference of two such, for a paired comparison.
        edges: ascending positions; one entry for each pair of neighbors.
        seed, samples: of the bootstrap, and its size.

    Returns:
        ``start``, ``end``, ``mean``, ``low`` and ``high`` of each.
    """
    pairs = list(itertools.pairwise(edges))
    means = torch.stack([losses[:, start:end].double().mean(1) for start, end in pairs], dim=1)
    found = zip(pairs, bootstrap_means(means, seed, samples).T.tolist(), strict=True)
    return [dict(zip(("start", "end", "mean", "low", "high"), (*pair, *ends), strict=True)) for pair, ends in found]
