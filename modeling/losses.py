"""The loss of a language model over part of the tokens at a time, for sequences whose logits would not fit."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ..kernels.context_parallel.sequence import ShardedSequence


_IGNORED = -100


class FoxLMHead(nn.Linear):
    """Hidden states to logits, or by ``reduce`` to what is wanted of them."""

    def forward(self, hidden_states: Tensor, reduce: Callable[[Tensor, "FoxLMHead"], Tensor] | None = None) -> Tensor:
        """Logits ``[..., vocab]`` of ``[..., hidden]``; or ``reduce(hidden_states, self)``, which calls `logits`.

        FSDP gathers a weight around a call of its module: all that needs it has to happen inside of one.
        """
        return self.logits(hidden_states) if reduce is None else reduce(hidden_states, self)

    def logits(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)


def number_of_targets(labels: Tensor, shift_labels: Tensor | None, given: Tensor | int | None = None) -> Tensor | int:
    """What a sum of losses is divided by: the number that is given, or that of targets; 1 where there are none.

    So the loss of a row without targets is 0. Other models of transformers return that too where they are given the
    number of a whole batch, but else NaN, the mean of nothing, which a training does not survive.
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
    """``loss_function`` of the logits of all tokens, of which no more than a chunk's are ever held.

    At 131,072 tokens and 50,304 words logits are 26 GB in float32, and a loss needs them three or four times over. Here
    backward computes each chunk's once more: one product beside the three that training does with the head.

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


def targets_of_shard(
    shards: "ShardedSequence",
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> dict[str, Any]:
    """Arguments of a loss by this rank's tokens, from those of the whole sequence: the sum over ranks is its loss.

    Args:
        shards: who has which tokens.
        labels, shift_labels, num_items_in_batch: as for `loss_in_chunks`. With a number of items, the sum over ranks is
            an equal share for each of them: who gives it (Trainer) multiplies losses by all processes.
    """
    count = number_of_targets(labels, shift_labels, num_items_in_batch)
    num_items_in_batch = count if num_items_in_batch is None else count * shards.split.ranks
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    own = shards.take(shift_labels)
    return {"labels": own, "shift_labels": own, "num_items_in_batch": num_items_in_batch}


def _takes_reduce(lm_head: nn.Module) -> bool:
    """Whether one call of the module may return a loss: not with LoRA or tensor parallelism around its product."""
    if not isinstance(lm_head, FoxLMHead):
        return False
    if not hasattr(lm_head.weight, "to_local"):
        return True
    # Not above: it takes a while to import, and only a sharded weight needs it.
    from torch.distributed.fsdp import FSDPModule

    return isinstance(lm_head, FSDPModule)
