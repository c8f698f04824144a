"""A sequence of which each rank has a part: what a model's layers ask of it."""

from typing import Any

from torch import Tensor

from ..backends import Backend
from ..decay import Decay, accumulate, hide_keys, mask_rows
from ..pruning.rules import Rule
from .attention import sharded_attention
from .backends import context_backend_of
from .pruning import prune_shards
from .shards import GatesBefore, Shards, StatesBefore


class ShardedSequence(Shards):
    """A sequence on several ranks as one of them sees it: `Shards` with the steps of forgetting attention.

    All ranks call each of these methods together, with tensors of their own tokens. ``backend`` is `backend_of` them.
    """

    def accumulate(self, log_f: Tensor, starts: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
        """As `decay.accumulate`, of this rank's tokens: with all that comes before them on any rank.

        Args:
            log_f: ``[B, T, Hf]`` log forget gates of this rank's tokens.
            starts: ``[B, T]`` bool, True where a new packed sequence begins.
            backend: where it runs.

        Returns:
            ``c`` as ``[B, Hf, T]`` float64 and ``kv_start`` as ``[B, Hf, T]`` int64, in tokens of the whole sequence.
        """
        # As if a token came before, so that a reset at the first of these is not taken for none.
        c, kv_start = accumulate(log_f, offset=1, starts=starts, sum_gates=backend.sum_gates)
        return GatesBefore.apply(c, kv_start, self, context_backend_of(backend).carry_gates)

    def hide_padding(self, decay: Decay, real: Tensor) -> Decay:
        """As `padding.hide_padding`, of this rank's tokens.

        Args:
            decay: of this rank's tokens.
            real: ``[B, T]`` bool, False where they are padding.
        """
        # No row starts later for padding further left, of which other ranks know.
        return mask_rows(hide_keys(decay, real), real)

    def states_before(self, states: Tensor, real: Tensor | None) -> Tensor:
        """The last real state before each segment of this rank, zero where there is none. Differentiable.

        Args:
            states: ``[B, T, heads, D]`` of this rank's tokens.
            real: ``[B, all tokens]`` bool, False for padding; None without.

        Returns:
            ``[B, segments, heads, D]``.
        """
        return StatesBefore.apply(states, real, self)

    def prune(
        self,
        decay: Decay,
        q: Tensor,
        k: Tensor,
        *,
        eps: float,
        rule: Rule,
        scale: float,
        logit_bound: float | Tensor | None,
        sink: Tensor | None = None,
        backend: Backend,
    ) -> Decay:
        """As `pruning.prune.prune`, for this rank's queries over the keys of all ranks: see `prune_shards`."""
        ops = context_backend_of(backend)
        options: dict[str, Any] = {"eps": eps, "rule": rule, "scale": scale, "logit_bound": logit_bound, "sink": sink}
        return prune_shards(decay, q, k, self, ops, **options)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Decay, *, scale: float, dropout: float, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        """Attention of this rank's queries over the keys of all ranks: see `sharded_attention`."""
        return sharded_attention(
            q, k, v, decay, self, backend, context_backend_of(backend), scale=scale, dropout=dropout
        )
