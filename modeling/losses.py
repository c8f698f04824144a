"""Losses of a language model: cross-entropy in chunks of tokens, shards of a sequence, forget-gate regularisation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ..kernels.context_parallel.sequence import ShardedSequence


_IGNORED = -100
# Nats of decay at which pruning drops a key: -log(eps) = 10, and the range of a head's logits.
_NATS_OF_PRUNED_KEY = 30.0


class FoxLMHead(nn.Linear):
    """The language-model head: ``[..., hidden] -> [..., vocab]`` logits, or what ``reduce`` makes of them."""

    def forward(self, hidden_states: Tensor, reduce: Callable[[Tensor, "FoxLMHead"], Tensor] | None = None) -> Tensor:
        """Logits ``[..., vocab]`` of ``[..., hidden]``; or ``reduce(hidden_states, self)``, which calls `logits`.

        FSDP gathers a weight around a call of its module, so all that needs the weight has to run inside that call.
        """
        return self.logits(hidden_states) if reduce is None else reduce(hidden_states, self)

    def logits(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)


def number_of_targets(labels: Tensor, shift_labels: Tensor | None, given: Tensor | int | None = None) -> Tensor | int:
    """The divisor of a sum of losses: ``given``, or the number of targets; at least 1.

    So the loss of a row without targets is 0. Other models of transformers return 0 too if they are given the number of
    a whole batch, but otherwise NaN, from which training does not recover.
    """
    if given is None:
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        given = (targets != _IGNORED).sum()
    return given.clamp(min=1) if isinstance(given, Tensor) else max(given, 1)


def loss_in_chunks(
    hidden_states: Tensor,
    lm_head: nn.Module,
    loss_function: Callable[..., Tensor],
    chunk_size: int,
    *,
    labels: Tensor,
    num_items_in_batch: Tensor | int,
    shift_labels: Tensor | None = None,
    vocab_size: int,
) -> Tensor:
    """``loss_function`` of the logits of all tokens, holding the logits of one chunk at a time.

    At 131,072 tokens and a vocabulary of 50,304, logits are 26 GB in float32, and a loss needs them three or four times
    over. Here backward recomputes each chunk's logits: one matmul beside the three that training does with the head.

    Args:
        hidden_states: ``[B, T, hidden]``, what the head takes.
        lm_head: hidden states to logits.
        loss_function: as a model's `loss_function`: takes ``logits`` and all that is named below.
        chunk_size: tokens whose logits are held, of all rows together.
        labels: ``[B, T]`` int64, -100 for none; shifted here.
        shift_labels: ``[B, T]`` targets that are shifted already, instead of ``labels``.
        num_items_in_batch: what the sum is divided by.
        vocab_size: number of logits of a token.

    Returns:
        The loss, a scalar.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    targets = shift_labels.flatten()

    def summed(states: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        def part(states: Tensor, targets: Tensor) -> Tensor:
            counts = {"shift_labels": targets, "num_items_in_batch": num_items_in_batch, "vocab_size": vocab_size}
            return loss_function(logits=head(states), labels=None, **counts)

        chunks = zip(states.flatten(0, 1).split(chunk_size), targets.split(chunk_size), strict=True)
        losses = [checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return sum(losses[1:], start=losses[0])

    if _takes_reduce(lm_head):
        return lm_head(hidden_states, lambda states, head: summed(states, head.logits))
    return summed(hidden_states, lm_head)


def forget_aux_loss(
    gate_logits: Sequence[Tensor], real: Tensor | None, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Forget-gate regularisation: a smooth stand-in for the computed-tile fraction that the gates leave.

    A head whose gates decay by ``n`` nats over a sequence computes about ``min(1, 30 / n)`` of its tiles. The loss is
    ``30 / (30 + n)``, whose gradient also reaches a head that computes all tiles. A packed row counts as one sequence.

    Args:
        gate_logits: of each layer, ``[B, T, Hf]``.
        real: ``[B, T]`` bool, False for padding; None without.
        total: sums over the ranks that have parts of each row; None if this rank has all.

    Returns:
        Mean over rows, layers and gates, a scalar in ``(0, 1]``.
    """
    shares = []
    for logits in gate_logits:
        log_f = nn.functional.logsigmoid(logits)
        if real is not None:
            log_f = log_f.masked_fill(~real[..., None], 0.0)
        nats = log_f.sum(1) if total is None else total(log_f.sum(1))
        shares.append((_NATS_OF_PRUNED_KEY / (_NATS_OF_PRUNED_KEY - nats)).mean().to(gate_logits[0].device))
    return torch.stack(shares).mean()


def targets_of_shard(
    shards: "ShardedSequence",
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> dict[str, Any]:
    """Arguments of this rank's loss, from those of the whole sequence, whose loss is the sum over ranks.

    Args:
        shards: which rank has which tokens.
        labels, shift_labels, num_items_in_batch: as for `loss_in_chunks`. If ``num_items_in_batch`` is given, the
            sum is divided by the number of ranks: Trainer, which gives it, multiplies losses by that of processes.
    """
    count = number_of_targets(labels, shift_labels, num_items_in_batch)
    num_items_in_batch = count if num_items_in_batch is None else count * shards.split.ranks
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    own = shards.take(shift_labels)
    return {"labels": own, "shift_labels": own, "num_items_in_batch": num_items_in_batch}


def _takes_reduce(lm_head: nn.Module) -> bool:
    """Whether one call of the module may return a loss; not with LoRA or tensor parallelism around its matmul."""
    if not isinstance(lm_head, FoxLMHead):
        return False
    if not hasattr(lm_head.weight, "to_local"):
        return True
    # Imported here, since it takes a while and only a sharded weight needs it.
    from torch.distributed.fsdp import FSDPModule

    return isinstance(lm_head, FSDPModule)
