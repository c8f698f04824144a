"""What a model's forget gates do on given text, and what Adaptive Computation Pruning would skip there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foxlm.kernels.decay import Decay, accumulate
from foxlm.kernels.pruning import Rule, first_kept, share_skipped

from .recording import AttentionInputs

RULES: tuple[Rule, ...] = ("paper", "tight")


def decay_times(log_f: Tensor) -> Tensor:
    """Mean decay time of each gate in tokens, ``-1 / mean(log f)``: after so many tokens a weight fell by ``e``.

    Args:
        log_f: ``[B, T, Hf]`` log forget gates.

    Returns:
        ``[Hf]`` float64; ``inf`` for a gate that never forgets.
    """
    return 1.0 / log_f.double().mean((0, 1)).abs()


def decay_time_table(layers: Sequence[AttentionInputs]) -> Tensor:
    """`decay_times` of every layer: ``[L, H]`` float64, one column per query head."""
    rows = []
    for layer in layers:
        times, heads = decay_times(layer.log_f), layer.q.shape[2]
        rows.append(times.repeat_interleave(heads // len(times)))
    return torch.stack(rows)


def skipped_shares(
    layers: Sequence[AttentionInputs], log_eps: Sequence[float], rule: Rule, block_q: int = 1, block_k: int = 1
) -> Tensor:
    """Share of causal attention that pruning skips on recorded text, averaged over its sequences.

    The rule ``paper`` bounds the logits by ``scale * max |q| * max |k|`` of each sequence and head.

    Args:
        layers: recorded attention.
        log_eps: natural logs of ``eps``, the weight that a row may lose in total.
        rule: ``"paper"`` or ``"tight"``.
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
    """`first_kept` of a recorded layer: ``[B, H, ceil(T / block_q)]`` int64."""
    return first_kept(
        layer.q,
        layer.k,
        layer.log_f,
        eps=math.exp(log_eps),
        rule=rule,
        scale=layer.scale,
        block_q=block_q,
        block_k=block_k,
    )


def attention_weights(layer: AttentionInputs, head: int, sequence: int = 0) -> Tensor:
    """The dense attention weights of one head: ``[T, T]`` float64, zero above the diagonal."""
    q = layer.q[sequence, :, head].double()
    k = layer.k[sequence, :, head * layer.k.shape[2] // layer.q.shape[2]].double()
    gate = head * layer.log_f.shape[2] // layer.q.shape[2]
    c, first = accumulate(layer.log_f[sequence : sequence + 1, :, gate : gate + 1])
    decay = Decay(c, c, first, torch.arange(len(q), device=q.device))
    return (layer.scale * q @ k.T + decay.bias()[0, 0]).softmax(-1)
