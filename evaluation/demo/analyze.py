"""What the trained model's gates do on held-out text, and what pruning would skip."""

from dataclasses import dataclass

import numpy as np
import torch

from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.modeling_fox import FoxForCausalLM

from ..gates import RULES, attention_weights, decay_time_table, kept_from, skipped_shares
from ..recording import record_attention

LOG_EPS = (-5.0, -10.0, -15.0, -20.0)
MAP_RULE: Rule = "tight"
MAP_LOG_EPS = -10.0
TILE = (64, 64)


@dataclass(frozen=True)
class HeadMap:
    """One head's attention on a snippet.

    Attributes:
        layer, head: which.
        decay_time: in tokens, measured on all windows.
        weights: ``[T, T]`` attention weights.
        first: ``[T]`` first key each query keeps, by `MAP_RULE` at `MAP_LOG_EPS`.
    """

    layer: int
    head: int
    decay_time: float
    weights: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """Measurements on held-out windows.

    Attributes:
        decay_times: ``[L, H]`` tokens.
        pairs, tiles: by rule, ``[len(LOG_EPS), L, H]`` share skipped of pairs and of tiles of `TILE`.
        length: tokens per window.
        tokens: tokens in all windows.
        maps: a head that forgets fast and the one that forgets slowest.
        snippet: the bytes that the maps are of.
    """

    decay_times: np.ndarray
    pairs: dict[str, np.ndarray]
    tiles: dict[str, np.ndarray]
    length: int
    tokens: int
    maps: list[HeadMap]
    snippet: bytes


@torch.no_grad()
def analyze(model: FoxForCausalLM, held_out: np.ndarray, snippet: int) -> Analysis:
    """Record attention on held-out windows and measure gates and pruning.

    Args:
        model: the trained model.
        held_out: ``[N, T]`` tokens.
        snippet: tokens at the start of the first window for the attention maps.
    """
    tokens = torch.from_numpy(held_out).to(model.device)
    with record_attention(model) as layers:
        model(input_ids=tokens, use_cache=False)
    with record_attention(model) as first_tokens:
        model(input_ids=tokens[:1, :snippet], use_cache=False)
    times = decay_time_table(layers).cpu().numpy()
    maps = []
    # The very fastest head sees only its own token: one that spans a few shows more.
    fast = int(np.abs(np.log(times) - np.log(snippet / 64)).argmin())
    for flat in (fast, int(times.argmax())):
        layer, head = divmod(flat, times.shape[1])
        shown = first_tokens[layer]
        kept = kept_from(shown, MAP_LOG_EPS, MAP_RULE)[0, head]
        maps.append(
            HeadMap(
                layer=layer,
                head=head,
                decay_time=float(times[layer, head]),
                weights=attention_weights(shown, head).cpu().numpy(),
                first=kept.cpu().numpy(),
            )
        )
    return Analysis(
        decay_times=times,
        pairs={rule: skipped_shares(layers, LOG_EPS, rule).cpu().numpy() for rule in RULES},
        tiles={rule: skipped_shares(layers, LOG_EPS, rule, *TILE).cpu().numpy() for rule in RULES},
        length=held_out.shape[1],
        tokens=held_out.size,
        maps=maps,
        snippet=bytes(token for token in held_out[0, :snippet].tolist() if token < 256),
    )
