"""Context parallelism: one sequence on several ranks, each with the tokens of some segments of it.

What the layers need of other ranks' tokens, beside keys and values (`sharded_attention`), is little:

* Running sums of gates: the totals of each segment, so that each may begin with what was summed before it. They are
  exchanged in float64, so decay across ranks is as exact as within one.
* Hard resets and starts of packed sequences: the last one of each segment.
* Token shift: the last real state of each segment.

Each is one small exchange of all with all, differentiable, without waiting for the device.

What a rank returns as its loss is the loss of the whole sequence, so gradients are those of a mean over ranks, as
data-parallel engines (DDP, FSDP) take it.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..backends import HAS_TRITON, runs_kernels
from ..decay import accumulate
from ..tiles import PRUNED_KEYS
from .partition import NAMED_SPLITS, Split, TokenSplit
from .partition_tables import SplitTables, split_tables

if HAS_TRITON:
    from .kernels import carry_on_device

if dist.is_available():
    # Of torch 2.13, which warns of the older name.
    _all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """Bytes of keys and values that this rank has received, over all layers and steps since `clear`.

    Attributes:
        moved: by forward passes, with the running sums that come along. Backward moves as many, in gradients.
        ring: what ring attention would have moved: all keys and values of all other ranks, causal or not.
    """

    moved: int = 0
    ring: int = 0

    @property
    def share(self) -> float:
        """What was moved, of what ring attention would have moved."""
        return self.moved / self.ring if self.ring else 0.0

    def clear(self) -> None:
        """Begin anew."""
        self.moved = self.ring = 0


class ContextParallel:
    """A group of ranks that share the tokens of each sequence.

    Attributes:
        group: its process group.
        rank, ranks: of this process within the group, and how many there are.
        traffic: what attention has fetched.

    Example:
        >>> mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("cp",))  # doctest: +SKIP
        >>> model.set_context_parallel(ContextParallel(mesh["cp"]))  # doctest: +SKIP
    """

    def __init__(self, group: "DeviceMesh | dist.ProcessGroup | None" = None, split: str | Split = "balanced") -> None:
        """
        Args:
            group: a mesh of one dimension or a process group; all processes by default.
            split: who gets which tokens: ``"balanced"``, ``"contiguous"``, or a function from the numbers of tokens and
                of ranks to `Segment`s, the same on all ranks.

        Raises:
            ValueError: processes were not started as a group, or an argument is not as above.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "context parallelism needs a process group, got a single process without one: start the program with "
                "torchrun or accelerate launch, and call torch.distributed.init_process_group"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be a mesh of one dimension, such as mesh['cp'], got {group.ndim} dimensions"
                )
            group = group.get_group()
        if isinstance(split, str) and split not in NAMED_SPLITS:
            raise ValueError(f"split must be one of {list(NAMED_SPLITS)} or a function, got {split!r}")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(f"group must hold this process, rank {dist.get_rank()}; it does not")
        self.traffic = Traffic()
        self._split = NAMED_SPLITS[split] if isinstance(split, str) else split
        self.shards = functools.lru_cache(maxsize=16)(self._shards)
        self._compared = False

    @torch.no_grad()
    def check_same(self, **inputs: Tensor | None) -> None:
        """Compare what the ranks were called with, the first time: later calls do not wait for a look at it.

        Args:
            inputs: by name; of floating-point ones only shapes are compared, which may round differently.

        Raises:
            ValueError: ranks have different ones. All of them raise it, and none is left waiting.
        """
        if self._compared or torch.compiler.is_compiling():
            return
        device = next(x.device for x in inputs.values() if x is not None)
        own = torch.stack([_fingerprint(x, device) for x in inputs.values()])
        found = own.new_empty(self.ranks, *own.shape)
        _all_gather(found.flatten(0, 1), own, group=self.group)
        differ = (found != found[0]).any(-1).any(0).tolist()
        if any(differ):
            names = [name for name, differs in zip(inputs, differ, strict=True) if differs]
            raise ValueError(
                f"with context parallelism all {self.ranks} ranks of a group must be given the same whole sequences, "
                f"got different {', '.join(names)}: does a sampler deal out other rows to each?"
            )
        self._compared = True

    def _shards(self, length: int) -> "Shards":
        return Shards(self, TokenSplit(length, self.ranks, self._split(length, self.ranks)))

    # A copy of a model on this rank is of the same group.
    def __deepcopy__(self, memo: dict) -> "ContextParallel":
        return self

    # What is stored or sent to another process is of none: the model comes without context parallelism.
    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.ranks})"


def _fingerprint(x: Tensor | None, device: torch.device) -> Tensor:
    """``[4]`` int64: the shape of an argument, and a number that its values have."""
    shape, values = [0, 0, 0], torch.zeros((), dtype=torch.int64, device=device)
    if x is not None:
        shape = [*x.shape, 0, 0, 0][:3]
        if not x.is_floating_point():
            flat = x.to(device, torch.int64).flatten()
            values = (flat * (torch.arange(len(flat), device=device) % 8191 + 1)).sum()
    return torch.cat([torch.tensor(shape, device=device), values[None]])


class Shards:
    """One sequence length dealt out to the ranks of a group, and the exchanges between them."""

    def __init__(self, context: ContextParallel, split: TokenSplit) -> None:
        self.context, self.split = context, split
        self.rank = context.rank
        self.segments = split.of(self.rank)
        self.rows = split.rows(self.rank)
        # Indices, among all segments, of those of this rank.
        self.own = [i for i, segment in enumerate(split.segments) if segment.rank == self.rank]
        self._tables: dict[torch.device, SplitTables] = {}

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of ``x``, which has all of them along ``dim``."""
        return self.split.take(x, self.rank, dim)

    def tables(self, device: torch.device) -> SplitTables:
        """Those of this rank. Kept: a copy to a GPU would wait for it."""
        if device not in self._tables:
            self._tables[device] = split_tables(self.split, self.rank, device)
        return self._tables[device]

    def gather(self, own: Tensor) -> Tensor:
        """``[ranks, ...]``: a tensor of each rank, alike in shape and type; without gradients."""
        gathered = own.new_empty(self.split.ranks, *own.shape)
        _all_gather(gathered.flatten(0, 1), own, group=self.context.group)
        return gathered

    def from_all(self, parts: list[Tensor]) -> list[Tensor]:
        """One tensor for each segment of the sequence, from the rank that has it; without gradients.

        Args:
            parts: a tensor for each segment of this rank, alike in shape and type on all ranks.
        """
        gathered = self.gather(torch.stack([*parts, *parts[:1] * (self.split.most_segments - len(parts))]))
        return [gathered[x.rank, slot] for x, slot in zip(self.split.segments, self.split.slots, strict=True)]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks. Differentiable: its gradient is the sum of all ranks' gradients."""
        return _Sum.apply(x, self.context.group)

    def accumulate(self, log_f: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `decay.accumulate`, of this rank's tokens: with all that comes before them on any rank.

        Args:
            log_f: ``[B, T, Hf]`` log forget gates of this rank's tokens.
            starts: ``[B, T]`` bool, True where a new packed sequence begins.

        Returns:
            ``c`` as ``[B, Hf, T]`` float64 and ``first`` as ``[B, Hf, T]`` int64, in tokens of the whole sequence.
        """
        # As if a token came before, so that a reset at the first of these is not taken for none.
        c, first = accumulate(log_f, offset=1, starts=starts)
        return _WithGatesBefore.apply(c, first, self)

    def states_before(self, states: Tensor, real: Tensor | None) -> Tensor:
        """The last real state before each segment of this rank, zero where there is none. Differentiable.

        Args:
            states: ``[B, T, heads, D]`` of this rank's tokens.
            real: ``[B, all tokens]`` bool, False for padding; None without.

        Returns:
            ``[B, segments, heads, D]``.
        """
        return _StatesBefore.apply(states, real, self)

    @torch.no_grad()
    def centered(self, k: Tensor) -> Tensor:
        """As `pruning.centered`, for this rank's keys: minus the mean of the first 64 of the first segment."""
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        means = self.from_all([wide[:, rows][:, :PRUNED_KEYS].mean(1, keepdim=True) for rows in self.rows])
        return wide - means[0]


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _WithGatesBefore(torch.autograd.Function):
    """Running sums and first keys over this rank's tokens, counted from 1, to those over the whole sequence."""

    @staticmethod
    def forward(ctx, c: Tensor, first: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
        ctx.shards = shards
        carry = carry_on_device if runs_kernels(c) else _carry_in_pytorch
        c, first = carry(c.contiguous(), first.contiguous(), shards)
        ctx.mark_non_differentiable(first)
        return c, first

    @staticmethod
    def backward(ctx, dc: Tensor, _) -> tuple[Tensor, None, None]:
        shards = ctx.shards
        totals = shards.from_all([dc[..., rows].sum(-1) for rows in shards.rows])
        dc = dc.clone()
        # A gate is in the sums of all later tokens. Of those on this rank autograd knows; here are those in between.
        for i, rows, following in zip(shards.own, shards.rows, [*shards.own[1:], len(totals)], strict=True):
            for total in totals[i + 1 : following]:
                dc[..., rows.stop - 1] += total
        return dc, None, None


def _carry_in_pytorch(c: Tensor, first: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """As `carry_on_device`."""
    c, first = c.clone(), first.clone()
    ends = []
    for (_, start, _), rows in zip(shards.segments, shards.rows, strict=True):
        # A reset further back is of another segment, whose end says where it is.
        first[..., rows].add_(start - rows.start - 1).masked_fill_(first[..., rows] < start, 0)
        # Indices of tokens are exact in float64 too.
        ends.append(torch.stack([c[..., rows.stop - 1], first[..., rows.stop - 1].double()]))
    sums, resets = torch.stack(shards.from_all(ends)).unbind(1)
    # The sum of a rank's segment goes on from its segment before.
    previous = shards.split.previous_of_rank
    own_before = torch.stack([torch.zeros_like(sums[0]) if i is None else sums[i] for i in previous])
    totals = sums - own_before
    shifts = totals.cumsum(0) - totals - own_before
    resets = resets.long().cummax(0).values
    for i, rows in zip(shards.own, shards.rows, strict=True):
        c[..., rows] += shifts[i, ..., None]
        if i:
            first[..., rows].clamp_(min=resets[i - 1, ..., None])
    return c, first


class _StatesBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, real: Tensor | None, shards: Shards) -> Tensor:
        own_real = None if real is None else shards.take(real)
        last = [_last_real(states, None if own_real is None else own_real[:, rows], rows) for rows in shards.rows]
        # Of each segment, which sequences of the batch have a real token in it.
        has = [None if real is None else real[:, start:stop].any(1) for _, start, stop in shards.split.segments]
        ctx.shards, ctx.last, ctx.has, ctx.shape = shards, last, has, states.shape
        batch = torch.arange(len(states), device=states.device)
        before = torch.zeros_like(states[:, 0])
        found = []
        for i, end in enumerate(shards.from_all([states[batch, index] for index in last])):
            if i in shards.own:
                found.append(before)
            some = has[i]
            before = end if some is None else torch.where(some[:, None, None], end, before)
        return torch.stack(found, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        shards = ctx.shards
        # To the last real token before: in the segment before, or further back for the sequences without one there.
        to = gradient.new_zeros(len(shards.split.segments), len(gradient), *gradient.shape[2:])
        for i, d_before in zip(shards.own, gradient.unbind(1), strict=True):
            left = d_before
            for j in reversed(range(i)):
                has = ctx.has[j]
                to[j] += left if has is None else left.masked_fill(~has[:, None, None], 0.0)
                if has is None:
                    break
                left = left.masked_fill(has[:, None, None], 0.0)
        dist.all_reduce(to, group=shards.context.group)
        d_states = gradient.new_zeros(ctx.shape)
        batch = torch.arange(len(gradient), device=gradient.device)
        for i, index in zip(shards.own, ctx.last, strict=True):
            d_states[batch, index] = to[i]
        return d_states, None, None


def _last_real(states: Tensor, real: Tensor | None, rows: slice) -> Tensor:
    """Index of the last real token of ``rows`` for each sequence, ``[B]``; any of them where none is."""
    if real is None:
        return torch.full((len(states),), rows.stop - 1, device=states.device)
    index = torch.arange(rows.start, rows.stop, device=states.device)
    return torch.where(real, index, rows.start).amax(1)
