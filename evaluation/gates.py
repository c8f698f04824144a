"""What a model's forget gates do on given text, and what Adaptive Computation Pruning would skip there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foxlm.kernels.argument_types import typed
from foxlm.kernels.backends import backend_of
from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.pruning.prune import first_kept, prune, share_skipped
from foxlm.kernels.pruning.rules import Rule, centered, key_center
from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES

from .recording import AttentionInputs

RULES: tuple[Rule, ...] = ("paper", "tight")


@typed
def decay_times(log_f: Tensor) -> Tensor:
    """Mean decay time of each gate in tokens, ``-1 / mean(log f)``: after so many tokens a weight fell by ``e``.

    Args:
        log_f: ``[B, T, Hf]`` log forget gates.

    Returns:
        ``[Hf]`` float64; ``inf`` for a gate that never forgets.
    """
    return 1.0 / log_f.double().mean((0, 1)).abs()


@typed
def decay_time_table(layers: Sequence[AttentionInputs]) -> Tensor:
    """`decay_times` of every layer: ``[L, H]`` float64, one column per query head."""
    groups = [layer.q.shape[2] // layer.log_f.shape[2] for layer in layers]
    return torch.stack([decay_times(x.log_f).repeat_interleave(n) for x, n in zip(layers, groups, strict=True)])


@typed
def skipped_shares(
    layers: Sequence[AttentionInputs], log_eps: Sequence[float], rule: Rule, block_q: int = 1, block_k: int = 1
) -> Tensor:
    """Share of causal attention that pruning skips on recorded text, averaged over its sequences.

    The rule ``paper`` bounds the logits as the model does: by the weights of QK-norm where they tell, else by ``scale *
    max |q| * max |k|`` of each sequence and head.

    Args:
        layers: recorded attention.
        log_eps: natural logs of ``eps``, the weight that a row may lose in total.
        rule: as for `first_kept`.
        block_q, block_k: sizes of the tiles that are skipped or kept; 1 and 1 count pairs of query and key.

    Returns:
        ``[len(log_eps), L, H]`` float64 in ``[0, 1)``.
    """
    shares = torch.stack(
        [
            share_skipped(kept_from(layer, value, rule, block_q, block_k), layer.k.shape[1], block_q, block_k).mean(0)
            for value in log_eps
            for layer in layers
        ]
    )
    return shares.unflatten(0, (len(log_eps), len(layers)))


def kept_from(layer: AttentionInputs, log_eps: float, rule: Rule, block_q: int = 1, block_k: int = 1) -> Tensor:
    """`first_kept` of a recorded layer, as its model bounds the logits: ``[B, H, ceil(T / block_q)]`` int64."""
    keys, sink = bounded_keys(layer, rule)
    return first_kept(
        layer.q,
        keys,
        layer.log_f,
        eps=math.exp(log_eps),
        rule=rule,
        scale=layer.scale,
        logit_bound=layer.logit_bound,
        block_q=block_q,
        block_k=block_k,
        sink=sink,
    )


def bounded_keys(layer: AttentionInputs, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """The keys that the model gives to ``rule``, and that of the sink."""
    sink = None if layer.sink is None else layer.sink[0]
    if not layer.centers or rule == "paper":
        return layer.k, sink
    return centered(layer.k), None if sink is None else sink - key_center(layer.k)[:, 0]


def decay_of(layer: AttentionInputs) -> Decay:
    """The decay of a recorded layer, each query at its own key."""
    c, kv_start = accumulate(layer.log_f, sum_gates=backend_of(layer.q).sum_gates)
    if layer.after_sink is not None:
        kv_start = torch.maximum(kv_start, layer.after_sink)
    return Decay(c, c, kv_start, torch.arange(c.shape[-1], device=c.device))


def search(layer: AttentionInputs, decay: Decay, log_eps: float, rule: Rule) -> Decay:
    """``decay`` with the first key that attention reads, in the kernels' blocks and by their own search where they run.

    Args:
        layer, log_eps, rule: as of `skipped_shares`.
        decay: `decay_of` the layer.
    """
    keys, sink = bounded_keys(layer, rule)
    return prune(
        decay,
        layer.q,
        keys,
        eps=math.exp(log_eps),
        rule=rule,
        scale=layer.scale,
        logit_bound=layer.logit_bound if rule == "paper" else None,
        sink=sink,
        search=backend_of(layer.q).search_kv_start,
    )


def first_read(layer: AttentionInputs, log_eps: float, rule: Rule) -> Tensor:
    """First key that attention reads for each query by `search`, ``[B, H, T]`` int64."""
    first = search(layer, decay_of(layer), log_eps, rule).kv_start
    return first.repeat_interleave(layer.q.shape[2] // first.shape[1], dim=1)


def share_of_tiles_skipped(first: Tensor) -> Tensor:
    """Share of the kernels' tiles that attention skips, ``[B, H]`` float64, of what `first_read` gave."""
    # No query of a block reads a key before the first that the block's first query reads.
    return share_skipped(first[..., ::PRUNED_QUERIES], first.shape[-1], PRUNED_QUERIES, PRUNED_KEYS)


@typed
def attention_weights(layer: AttentionInputs, head: int, sequence: int = 0) -> Tensor:
    """The dense attention weights of one head: ``[T, T]`` float64, zero above the diagonal; without that of a sink."""
    q = layer.q[sequence, :, head].double()
    k = layer.k[sequence, :, head * layer.k.shape[2] // layer.q.shape[2]].double()
    gate = head * layer.log_f.shape[2] // layer.q.shape[2]
    one = layer._replace(log_f=layer.log_f[sequence : sequence + 1, :, gate : gate + 1])
    if layer.after_sink is not None:
        one = one._replace(after_sink=layer.after_sink[sequence : sequence + 1])
    logits = layer.scale * q @ k.T + decay_of(one).bias()[0, 0]
    if layer.sink is None:
        return logits.softmax(-1)
    of_sink = layer.scale * q @ layer.sink[0][head * layer.k.shape[2] // layer.q.shape[2]].double()
    return torch.cat([of_sink[:, None], logits], dim=1).softmax(-1)[:, 1:]


@typed
def attention_reach(layers: Sequence[AttentionInputs], share: float = 0.9, rows: int = 128) -> Tensor:
    """How far back each head looks: the distance in tokens within which ``share`` of its attention is, on average.

    What a query gives to the first key is left out: many heads of models without forget gates rest there when they
    have nothing to look for.

    Args:
        layers: recorded attention.
        share: of the attention, in (0, 1).
        rows: queries of each sequence that are looked at, evenly spread over its second half.

    Returns:
        ``[L, H]`` float64, at least 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    return torch.stack([_reach(layer, share, rows) for layer in layers])


def _reach(layer: AttentionInputs, share: float, rows: int) -> Tensor:
    length, heads = layer.q.shape[1:3]
    query = torch.linspace(length // 2, length - 1, min(rows, length - length // 2), device=layer.q.device).long()
    decay = decay_of(layer)
    bias = Decay(decay.query[..., query], decay.key, decay.kv_start[..., query], query).bias().float()
    seen = torch.arange(length, device=query.device) <= query[:, None]
    group, reach = heads // layer.k.shape[2], []
    for head in range(heads):
        weights = layer.scale * layer.q[:, query, head].float() @ layer.k[:, :, head // group].float().mT
        weights = (weights + bias[:, head * bias.shape[1] // heads]).softmax(-1)
        weights[..., 0] = 0.0
        # From each key on; keys after the query add nothing.
        within = weights.flip(-1).cumsum(-1).flip(-1)
        distance = (seen & (within < share * within[..., :1])).sum(-1)
        reach.append(distance.double().mean().clamp(min=1.0))
    return torch.stack(reach)
