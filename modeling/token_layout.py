"""Positions, padding and packing of the tokens of a forward pass, checked once and read by every layer."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting

from ..kernels.decay import accumulate, first_visible, running_max, sequence_starts
from ..kernels.tiles import PRUNED_KEYS
from ..kernels.validation import bool_mask, check_cu_seqlens, check_tensor, is_readable
from .versions import CACHE

if TYPE_CHECKING:
    from ..kernels.backends import Backend
    from ..kernels.context_parallel.sequence import ShardedSequence

# transformers' caches know one class per layer type. A copy of this code under another package name, loaded from a
# model's folder, has a type of its own, so that neither gets the other's layers.
LAYER_TYPE = f"{__package__}.forgetting_attention"


class TokenLayout(NamedTuple):
    """Positions, padding and packing of the tokens of one forward pass.

    Attributes:
        positions: ``[T]`` int64 index of each token in the cache.
        real: ``[B, T]`` bool, False for padding; None without padding.
        real_keys: ``[B, Tk]`` the same over all keys, those in the cache included.
        starts: ``[B, T]`` bool, True where a packed sequence begins; None without packing.
        slots: ``[1 + T]`` int64 index modulo 64 of the token before and of each: slots in a page of the cache.
        last_real: ``[B, 1 + T]`` int64, see `last_real_tokens`; None without padding.
        first_visible: ``[B, 1, T]`` int64, see `first_visible`; None without padding.
        after_sink: ``[B, 1, T]`` int64, first key of each token's sequence after a token that the attention sink stands
            for, 0 where it begins with another; None where that is not looked for.
        shards: with context parallelism, which rank has which tokens; all of the above is then of this rank's tokens.
        real_of_all_ranks: ``[B, tokens of all ranks]`` bool as `real`.
    """

    positions: Tensor
    real: Tensor | None
    real_keys: Tensor | None
    starts: Tensor | None
    slots: Tensor
    last_real: Tensor | None = None
    first_visible: Tensor | None = None
    after_sink: Tensor | None = None
    shards: "ShardedSequence | None" = None
    real_of_all_ranks: Tensor | None = None

    def accumulate(
        self,
        log_f: Tensor,
        backend: "Backend",
        offset: int | Tensor = 0,
        carry: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`decay.accumulate` of these tokens' log gates, ``[B, T, Hf]``; padding decays nothing."""
        if self.real is not None:
            log_f = log_f.masked_fill(~self.real[..., None], 0.0)
        if self.shards is not None:
            c, kv_start = self.shards.accumulate(log_f, self.starts, backend)
        else:
            c, kv_start = accumulate(log_f, offset, carry, self.starts, backend.sum_gates)
        return c, kv_start if self.after_sink is None else torch.maximum(kv_start, self.after_sink)

    def rope_positions(self, counts_padding: bool) -> Tensor:
        """Positions that RoPE reads where none are given, ``[B or 1, T]``; to be asked before `shard`.

        Args:
            counts_padding: as everywhere in transformers, which differences of positions do not see. The key of an
                attention sink is at the place of the first real token of each sequence.
        """
        if counts_padding:
            return self.positions[None]
        positions = self.positions[None]
        if self.real_keys is not None:
            positions = (self.real_keys.cumsum(1) - 1).index_select(1, self.positions)
        if self.starts is not None:
            # Real tokens before the sequence that each token belongs to.
            before = positions if self.real is None else positions + (~self.real).long()
            positions = positions - running_max(torch.where(self.starts, before, 0))
        return positions.clamp(min=0)

    def shard(self, shards: "ShardedSequence") -> "TokenLayout":
        """The layout of this rank's tokens."""
        real, starts = (None if x is None else shards.take(x) for x in (self.real, self.starts))
        positions = shards.take(self.positions, dim=0)
        after_sink = None if self.after_sink is None else shards.take(self.after_sink, dim=2)
        layout = TokenLayout(positions, real, real, starts, self.slots, after_sink=after_sink)
        return layout._replace(shards=shards, real_of_all_ranks=self.real)


def token_layout(
    tokens: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor | None,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    cache: Cache | None,
    layer_idx: int = 0,
    stands_for: Tensor | None = None,
) -> TokenLayout:
    """Check a caller's mask, positions and packing, and combine them.

    Args:
        tokens: ``B`` and ``T`` of the new tokens.
        device: where they are.
        attention_mask: see `padding_mask`.
        position_ids: ``[B or 1, T]``; where they restart a new packed sequence begins, if there is no earlier token.
        cu_seqlens: ``[N + 1]`` offsets of the sequences packed in a batch of one, of queries and of keys; the latter
            may be None.
        cache: earlier tokens.
        layer_idx: the cache's layer that is asked for its length, before it takes in the new tokens.
        stands_for: ``[B, T]`` bool, tokens that the attention sink stands for where they begin a sequence.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    batch, length = tokens
    past = 0 if cache is None else cache.get_seq_length(layer_idx)
    keys = length if cache is None else cache.get_mask_sizes(length, layer_idx)[0]
    seen = _read_without_sync(past)
    if seen is not None and seen + length > keys:
        refuse_overflow(seen, keys, length)
    if position_ids is not None:
        check_tensor("position_ids", position_ids)
        wrong = position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool
        if position_ids.shape not in ((1, length), (batch, length)) or wrong:
            raise ValueError(
                f"position_ids must be integers [B or 1, T] = [{batch} or 1, {length}], "
                f"got {position_ids.dtype} of shape {list(position_ids.shape)}"
            )

    real_keys = padding_mask(attention_mask, batch, past, length, keys, device)
    prepared = isinstance(attention_mask, dict)
    if real_keys is not None and not prepared and not is_torchdynamo_compiling() and real_keys.all():
        real_keys = None
    indices = torch.arange(-1, length, device=device) + past
    positions = indices[1:]
    real = None if real_keys is None else real_keys.index_select(1, positions)
    # A static cache that holds tokens reports a tensor: packing cannot begin there.
    fresh = isinstance(past, int) and past == 0
    starts = None
    queries, keys_of_queries = cu_seqlens
    if queries is not None:
        if batch != 1 or not fresh:
            raise ValueError(
                f"cu_seq_lens_q packs sequences in a batch of one, without earlier tokens in {CACHE}; "
                f"got a batch of {batch}, earlier tokens: {not fresh}"
            )
        check_cu_seqlens("cu_seq_lens_q", queries, length)
        if keys_of_queries is not None and keys_of_queries is not queries:
            check_cu_seqlens("cu_seq_lens_k", keys_of_queries, length)
            same_shape = keys_of_queries.shape == queries.shape
            if not same_shape or (is_readable(queries) and not torch.equal(keys_of_queries, queries)):
                raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q: a token's key belongs to its own sequence")
        starts = sequence_starts(queries, length).to(device)
    elif position_ids is not None and fresh:
        starts = _restarts(position_ids.to(device).expand(batch, -1), real, jumps=attention_mask is None)
    # A sequence may begin after padding, or where the host does not know what came before.
    may_begin = seen == 0 or (length > 1 and (seen is None or real is not None)) or is_torchdynamo_exporting()
    after_sink = None
    if may_begin:
        after_sink = _after_sink(stands_for, positions, real_keys, starts)
    elif real is not None and not prepared and not is_torchdynamo_compiling():
        # With a single token too, but that is seldom so, and in a decoding step each layer would pay for it. Of masks
        # that `generate` prepares this is not asked: it leaves no single token of a padded prompt.
        after_sink = _after_sink(stands_for, positions, real_keys, starts)
        if after_sink is not None and not after_sink.any():
            after_sink = None
    last_real = visible = None
    if real is not None and real_keys is not None:
        last_real, visible = last_real_tokens(real), first_visible(real_keys, real, positions)
    return TokenLayout(
        positions,
        real,
        real_keys,
        starts,
        slots=indices.remainder(PRUNED_KEYS),
        last_real=last_real,
        first_visible=visible,
        after_sink=after_sink,
    )


def _after_sink(
    stands_for: Tensor | None, positions: Tensor, real_keys: Tensor | None, starts: Tensor | None
) -> Tensor | None:
    """`TokenLayout.after_sink`; arguments as there."""
    if stands_for is None:
        return None
    begins = positions == (0 if real_keys is None else real_keys.int().argmax(1, keepdim=True))
    if starts is not None:
        begins = begins | starts
    return running_max(torch.where(begins & stands_for, positions + 1, 0))[:, None]


def last_real_tokens(real: Tensor) -> Tensor:
    """Index of the last token that is not padding, before the first of ``T`` tokens and up to each.

    Args:
        real: ``[B, T]`` bool, False for padding.

    Returns:
        ``[B, 1 + T]`` int64; -1 where it is earlier than all of them.
    """
    index = torch.arange(real.shape[1], device=real.device)
    return nn.functional.pad(running_max(torch.where(real, index, -1)), (1, 0), value=-1)


def _restarts(position_ids: Tensor, real: Tensor | None, jumps: bool) -> Tensor | None:
    """``[B, T]`` bool, True where a token's position does not follow that of the real token before; None if all do.

    Args:
        position_ids: ``[B, T]``.
        real: ``[B, T]`` bool, False for padding, whose positions mean nothing.
        jumps: whether a gap in positions begins a sequence too, as in transformers without a mask.
    """
    previous = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    if real is not None:
        # Position of the last real token before each; the first real token follows nothing.
        last_real = last_real_tokens(real)[:, :-1]
        previous = torch.where(last_real < 0, position_ids - 1, position_ids.gather(1, last_real.clamp(min=0)))
    starts = position_ids != previous + 1 if jumps else position_ids <= previous
    if real is not None:
        starts = starts & real
    # A traced graph cannot depend on the values, so there positions that do not restart cost a mask.
    if not is_torchdynamo_compiling() and not starts.any():
        return None
    return starts


def refuse_overflow(held: int, room: int, more: int) -> None:
    """Raise ValueError for ``more`` tokens after ``held`` in a cache with room for ``room``."""
    raise ValueError(
        f"{CACHE} holds {held} tokens and has room for {room}: {more} more do not fit; make it with a larger "
        "max_cache_len, or pass max_cache_len to the first generate"
    )


def _read_without_sync(length: int | Tensor) -> int | None:
    if isinstance(length, int):
        return length
    # Neither number nor tensor: a symbol of torch.export.
    return int(length) if isinstance(length, Tensor) and is_readable(length) else None


def padding_mask(
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    batch: int,
    past: int | Tensor,
    length: int,
    keys: int,
    device: torch.device,
) -> Tensor | None:
    """Bring an attention mask over all tokens so far to ``[B, keys]`` bool, False for padding; None without a mask.

    Args:
        attention_mask: ``[B, past + length]``, or what `create_masks_for_generate` made of it.
        batch: number of sequences.
        past: tokens in the cache; a tensor for a static cache that holds some.
        length: tokens of this pass.
        keys: keys that attention will see, those still to come in a static cache included.
        device: where the mask is wanted.

    Raises:
        ValueError: ``attention_mask`` is not 2-D, or does not fit.
    """
    if isinstance(attention_mask, dict):
        if attention_mask.keys() != {LAYER_TYPE}:
            raise ValueError(
                "attention_mask must be 2-D, or what FoxForCausalLM.create_masks_for_generate returns; "
                f"got a dictionary of {sorted(attention_mask)}"
            )
        return attention_mask[LAYER_TYPE]
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be 2-D, [B, Tk], nonzero for real tokens; got shape {list(attention_mask.shape)}. "
            "FoX has no 4-D masks: tokens that a query may not see would still decay those that it may"
        )
    seen = _read_without_sync(past)
    expected = attention_mask.shape[1] if seen is None else seen + length
    if attention_mask.shape != (batch, expected) or expected > keys:
        raise ValueError(
            f"attention_mask must cover the tokens in the cache and the new ones, [B, Tk] = {[batch, expected]}, "
            f"got {list(attention_mask.shape)}"
        )
    mask = bool_mask(attention_mask, device)
    # A static cache is longer than its tokens; causality hides the keys to come.
    return nn.functional.pad(mask, (0, keys - mask.shape[1]), value=True)
