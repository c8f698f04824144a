"""Loss of a language model by the position of the token that is predicted: how much a longer context helps it."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LOGITS_AT_ONCE = 4096


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Negative log-likelihood of each token given all before it in its row, in nats.

    One row is in memory at a time, in one pass, and the logits of some of its tokens.

    Args:
        model: a causal language model.
        rows: ``[N, T]`` int64 tokens, without padding.

    Returns:
        ``[N, T - 1]`` float32 on the CPU; entry ``t`` is of token ``t + 1``.
    """
    head = model.get_output_embeddings()
    losses = []
    for row in rows.to(model.device):
        states = model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        parts = zip(states.split(_LOGITS_AT_ONCE), row[1:].split(_LOGITS_AT_ONCE), strict=True)
        loss = [nn.functional.cross_entropy(head(state).float(), target, reduction="none") for state, target in parts]
        losses.append(torch.cat(loss).cpu())
    return torch.stack(losses)


def by_interval(losses: Tensor, edges: Sequence[int], seed: int = 0, samples: int = 1000) -> list[dict[str, float]]:
    """Mean losses between positions, with the 95% interval of a bootstrap over rows.

    Args:
        losses: ``[N, T - 1]`` of `loss_by_position`; or the difference of two such, for a paired comparison.
        edges: ascending positions; one entry for each pair of neighbors.
        seed: of the bootstrap.
        samples: its size.

    Returns:
        ``start``, ``end``, ``mean``, ``low`` and ``high`` of each.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(losses), (samples, len(losses)), generator=generator)
    found = []
    for start, end in itertools.pairwise(edges):
        means = losses[:, start:end].double().mean(1)
        low, high = means[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found.append({"start": start, "end": end, "mean": means.mean().item(), "low": low, "high": high})
    return found
