"""Calibrate a graft on some text, without training: attention sinks, and the decay time of each head.

    from foxlm.conversion.calibration import calibrate
    from foxlm.conversion.graft import graft

    model = graft(base, calibration=calibrate(base, rows, skip=0.5))

**Sinks.** Pretrained Transformers rest much of their attention on the first key, which a head that forgets would lose.
Where texts begin with the same token, a separator, its key and value depend on nothing else: they are constants of
the model, of each layer and key/value head, which become the graft's attention sinks (`FoxConfig.attention_sink`).

**Decay times.** The user asks for the share of attention that pruning is to skip. For each head, and each of some
decay times ``T``, two numbers are measured on the text:

* ``s(T)``, the share of its tiles of 128 queries and 64 keys that the rule ``measured`` would skip;
* ``e(T) = mean_i d_i' F d_i / 2``, what it costs in nats a token: with ``d_i`` the change of the head's output for
  query ``i``, and ``F`` the Fisher information of that output, it is the second-order approximation of the KL
  divergence from the base's predictions if this head alone forgets.

Chosen are the times with the least sum of costs whose mean share is what was asked for: by a Lagrange multiplier, each
head takes the ``T`` with the least ``e(T) - m s(T)``, and ``m`` is found by bisection. A head for which no
share is worth its cost never forgets, or has the longest decay time that the user allows. Heads that never forget
see, beyond the trained length, distances that their rotary embeddings were not trained for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from foxlm.evaluation.gates import attention_reach
from foxlm.evaluation.recording import AttentionInputs, record_attention
from foxlm.evaluation.text import check_tokens
from foxlm.kernels.argument_types import typed
from foxlm.kernels.pruning.measured import NEAR_SHARE
from foxlm.kernels.pruning.prune import first_kept
from foxlm.kernels.pruning.rules import Rule, key_center
from foxlm.kernels.tiles import PRUNED_KEYS, PRUNED_QUERIES
from foxlm.kernels.validation import is_number
from foxlm.modeling.configuration_fox import DEFAULT_EPS, DEFAULT_LOG_EPS
from foxlm.modeling.layers.forget_gate import log_spaced_times
from foxlm.modeling.modeling_fox import FoxForCausalLM

# Decay times that are tried, in tokens: from here to 4 times the text's length, so many for each factor of 2.
SHORTEST, _PER_OCTAVE = 8.0, 1.5
# Blocks of queries of each row that are measured, evenly spread, and the step from one query to the next for costs.
_BLOCKS, _QUERY_STEP = 16, 8
# Tokens of each row by which the Fisher information is estimated: their activations are held for backward.
_FISHER_TOKENS = 1024
# Weights and decays below exp of this are taken as this: their products are not denormal, which would be slow.
_LOG_ZERO = -40.0
# Shares of attention for which the least cost is reported.
_FRONTIER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Log of a price of skipped attention at which nothing is worth its cost.
_LEAST_PRICE = -60.0


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, for `graft`.

    Attributes:
        separator: token that texts begin with, for which the sinks stand.
        length: tokens of a row of the text.
        skip: share of attention that was to be skipped.
        longest: decay time in tokens that no head was to exceed.
        decay_times: ``[layers, gates]`` float64, in tokens; ``inf`` for a head that never forgets.
        sink_keys, sink_values: ``[layers, G, D]``, of the separator at the first position.
        reach: ``[layers, H]`` distance in tokens within which 90% of the base's attention lies, first key left out.
        cost: ``[layers, gates]`` nats a token that the decay time is expected to cost.
        skipped: by rule of pruning, ``[layers, H]`` share of tiles that it skips on the text at ``eps = e^-10``.
        frontier: least expected costs in nats, all heads together, by share that is skipped.
    """

    separator: int
    length: int
    skip: float
    longest: float
    decay_times: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    reach: Tensor
    cost: Tensor
    skipped: dict[Rule, Tensor]
    frontier: dict[float, float]


@typed
def calibrate(
    model: FoxForCausalLM,
    rows: Tensor,
    *,
    skip: float = 0.5,
    longest: float = math.inf,
    forget_gate_heads: str = "query",
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Attention sinks and decay times for a model without forget gates, from some text: see the module.

    It computes a layer at a time, of each row 16 blocks of 128 queries at most, so that memory is that of a forward
    pass, and of a backward pass through 1,024 tokens.

    Args:
        model: the base as a FoX model, ``graft(base, forget_gate="none")``, in evaluation mode.
        rows: ``[N, T]`` int64 tokens, as long as the texts that the graft is for; each begins with the separator.
        skip: share of attention's tiles that pruning is to skip on rows of this length, in (0, 1); more is skipped
            where ``longest`` asks for it.
        longest: decay time in tokens that no head exceeds, at least 8; ``inf``: heads may never forget.
        forget_gate_heads: as in `FoxConfig`.
        seed: of the tokens drawn for the Fisher information.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: an argument is not as above, or rows are too short for so much to be skipped.
    """
    _check(model, rows, skip, longest, forget_gate_heads)
    config, layers = model.config, model.config.num_hidden_layers
    heads, kv_heads, head_dim = config.heads
    group = heads // kv_heads if forget_gate_heads == "key_value" else 1
    rows = rows.to(model.device)
    times = _candidates(rows.shape[1], longest).to(model.device)
    sink_keys, sink_values = read_sinks(model, int(rows[0, 0]))
    with tqdm(total=len(rows) * (layers + 1) + layers, desc="calibrating", unit="layer", disable=not progress) as bar:
        fisher = torch.zeros(layers, heads, head_dim, head_dim, device=model.device)
        for index, row in enumerate(rows):
            _add_fisher(model, row[:_FISHER_TOKENS], seed + index, fisher)
            bar.update()
        fisher /= len(rows)
        profiles: list[_Profile] = []

        def profile(layer: AttentionInputs) -> None:
            profiles.append(_profile(layer, fisher[layer.layer], times))
            bar.update()

        with torch.no_grad(), record_attention(model, profile):
            for row in rows:
                model.base_model(input_ids=row[None], use_cache=False)
        shares, costs, reach = (
            torch.stack(found).unflatten(0, (len(rows), layers)).mean(0) for found in zip(*profiles, strict=True)
        )
        shares, costs = shares.unflatten(1, (-1, group)).mean(2), costs.unflatten(1, (-1, group)).sum(2)
        if (most := shares[..., 0].mean().item()) < skip:
            raise ValueError(
                f"skip must be at most {most:.2f}, what decay times of {times[0]:g} tokens skip of rows of "
                f"{rows.shape[1]}, got {skip}"
            )
        if longest == math.inf:
            # Never to forget skips nothing and costs nothing.
            shares, costs = (nn.functional.pad(x, (0, 1)) for x in (shares, costs))
            times = torch.cat([times, times.new_tensor([math.inf])])
        chosen = _choose(shares, costs, skip)
        decay_times = times[chosen]
        found: dict[Rule, list[Tensor]] = {"tight": [], "measured": []}

        def search(layer: AttentionInputs) -> None:
            for rule, per_layer in found.items():
                of_heads = decay_times[layer.layer].repeat_interleave(group)
                per_layer.append(_share_skipped(layer, of_heads, sink_keys[layer.layer], rule))
            bar.update()

        with torch.no_grad(), record_attention(model, search):
            model.base_model(input_ids=rows[:1], use_cache=False)
    return Calibration(
        separator=int(rows[0, 0]),
        length=rows.shape[1],
        skip=skip,
        longest=longest,
        decay_times=decay_times.cpu(),
        sink_keys=sink_keys,
        sink_values=sink_values,
        reach=reach.cpu(),
        cost=_of(costs, chosen).cpu(),
        skipped={rule: torch.stack(per_layer).cpu() for rule, per_layer in found.items()},
        frontier={
            share: _of(costs, _choose(shares, costs, share)).sum().item() for share in _FRONTIER if share <= most
        },
    )


@torch.no_grad()
def read_sinks(model: FoxForCausalLM, separator: int) -> tuple[Tensor, Tensor]:
    """Key and value of a token at the first position, ``[layers, G, D]`` each, as attention takes them."""
    with record_attention(model) as layers:
        model.base_model(input_ids=torch.tensor([[separator]], device=model.device), use_cache=False)
    keys, values = (torch.stack([x[0, 0] for x in found]) for found in zip(*((x.k, x.v) for x in layers), strict=True))
    return keys, values


class _Profile(NamedTuple):
    """What is measured of one layer on one row.

    Attributes:
        shares: ``[H, K]`` share of tiles that is skipped by each decay time that is tried.
        costs: ``[H, K]`` nats a token that it costs.
        reach: ``[H]``, as `attention_reach` has it.
    """

    shares: Tensor
    costs: Tensor
    reach: Tensor


def _check(model: FoxForCausalLM, rows: Tensor, skip: float, longest: float, forget_gate_heads: str) -> None:
    if not isinstance(model, FoxForCausalLM) or model.config.forget_gate != "none":
        raise ValueError("model must be a FoX model without forget gates, graft(base, forget_gate='none')")
    if not (is_number(skip) and 0.0 < skip < 1.0):
        raise ValueError(f"skip must be a share in (0, 1), got {skip!r}")
    if not (is_number(longest) and longest >= SHORTEST):
        raise ValueError(f"longest must be a decay time of at least {SHORTEST:g} tokens, got {longest!r}")
    if forget_gate_heads not in ("query", "key_value"):
        raise ValueError(f"forget_gate_heads must be 'query' or 'key_value', got {forget_gate_heads!r}")
    if rows.ndim != 2 or not len(rows) or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 tokens [N, T] with N at least 1, got {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] <= 2 * PRUNED_QUERIES:
        raise ValueError(f"rows must be longer than {2 * PRUNED_QUERIES} tokens, got {rows.shape[1]}")
    if not (rows[:, 0] == rows[0, 0]).all():
        raise ValueError("rows must all begin with the same token, the separator")
    check_tokens(int(rows.min()), int(rows.max()), model.config.vocab_size, "rows")


def _candidates(length: int, longest: float) -> Tensor:
    """Decay times to try: ``[K]`` float64, increasing."""
    most = min(4.0 * length, longest)
    octaves = math.log2(most / SHORTEST)
    return log_spaced_times(SHORTEST, most, math.ceil(_PER_OCTAVE * octaves) + 1).clamp(max=most)


def _add_fisher(model: FoxForCausalLM, row: Tensor, seed: int, fisher: Tensor) -> None:
    """Add the Fisher information of every head's output on ``row`` to ``fisher``, ``[L, H, D, D]``.

    The mean over tokens of ``g g'``, ``g`` the gradient of the log-likelihood of tokens drawn from the model.
    """

    def hook(index: int) -> Callable:
        def before_projection(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            out = args[0].requires_grad_() if args[0].is_leaf else args[0]
            out.register_hook(lambda gradient: add(index, gradient))
            return (out,)

        return before_projection

    def add(index: int, gradient: Tensor) -> None:
        by_head = gradient[0].unflatten(-1, fisher.shape[1:3]).float()
        fisher[index] += torch.einsum("thd,the->hde", by_head, by_head) / len(by_head)

    needed = [weight for weight in model.parameters() if weight.requires_grad]
    layers: Any = model.model.layers
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            log_p = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
            generator = torch.Generator(row.device).manual_seed(seed)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            log_p.gather(1, drawn).sum().backward()
    finally:
        for handle in hooks:
            handle.remove()
        for weight in needed:
            weight.requires_grad_(True)


def _query_blocks(length: int) -> list[int]:
    """First queries of the blocks that are measured."""
    count = length // PRUNED_QUERIES
    spread = torch.linspace(0, count - 1, min(count, _BLOCKS), dtype=torch.float64).round().long()
    return (spread * PRUNED_QUERIES).tolist()


def _profile(layer: AttentionInputs, fisher: Tensor, times: Tensor) -> _Profile:
    q, k, v = (x[0].transpose(0, 1).float() for x in (layer.q, layer.k, layer.v))
    group, starts, shares, costs = len(q) // len(k), _query_blocks(q.shape[1]), [], []
    tiles = sum((start + PRUNED_QUERIES) // PRUNED_KEYS for start in starts)
    for head in range(len(k)):
        of_group = slice(head * group, (head + 1) * group)
        blocks = [_block(q[of_group], k[head], v[head], layer.scale, fisher[of_group], times, i) for i in starts]
        skipped, cost = (torch.stack(found) for found in zip(*blocks, strict=True))
        shares.append(skipped.sum(0).double() / tiles)
        costs.append(cost.mean(0).double())
    return _Profile(torch.cat(shares), torch.cat(costs), attention_reach([layer])[0])


def _block(
    q: Tensor, k: Tensor, v: Tensor, scale: float, fisher: Tensor, times: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Tiles of a block of queries that each decay time skips, and what it costs a query: ``[N, K]`` each.

    Args:
        q: ``[N, T, D]`` queries of the heads that share a key.
        k, v: ``[T, D]``, of which the first are those of the sink.
        scale: of the logits.
        fisher: ``[N, D, D]``.
        times: ``[K]`` decay times.
        start: first query.
    """
    end = start + PRUNED_QUERIES
    query, key = (torch.arange(*x, device=q.device) for x in ((start, end), (0, end)))
    logits = scale * q[:, start:end] @ k[:end].mT
    logits.masked_fill_(key > query[:, None], -math.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).clamp(min=_LOG_ZERO).exp()
    weights.masked_fill_(key > query[:, None], 0.0)
    sink = weights[..., :1].clone()
    weights[..., 0] = 0.0
    rates = (1.0 / times).float()
    skipped = _skipped_tiles(weights, sink, query, rates)

    weights, sink, query = weights[:, ::_QUERY_STEP], sink[:, ::_QUERY_STEP], query[::_QUERY_STEP]
    distance = (query[:, None] - key).clamp(min=0)
    sink, outputs = sink[:, None], []
    # Without decay, then by each decay time; so many at once as take the memory of the weights of all queries.
    for some in nn.functional.pad(rates, (1, 0)).split(_QUERY_STEP):
        decayed = weights[:, None] * (distance * -some[:, None, None]).clamp(min=_LOG_ZERO).exp()
        outputs.append((decayed @ v[:end] + sink * v[0]) / (decayed.sum(-1, keepdim=True) + sink))
    output = torch.cat(outputs, 1)
    change = output[:, 1:] - output[:, :1]
    return skipped, (change @ fisher[:, None] * change).sum((-1, -2)) / (2 * len(query))


def _skipped_tiles(weights: Tensor, sink: Tensor, query: Tensor, rates: Tensor) -> Tensor:
    """How many tiles the rule ``measured`` skips of a block of queries where the bound shows nothing: ``[N, K]``.

    Args:
        weights: ``[N, 128, keys]`` of keys before decay, up to a factor of each row.
        sink: ``[N, 128, 1]`` weight of the sink.
        query: ``[128]`` positions of the queries.
        rates: ``[K]``, of decay.
    """
    weights = weights.unflatten(-1, (-1, PRUNED_KEYS))
    last = torch.arange(1, weights.shape[2] + 1, device=query.device) * PRUNED_KEYS - 1
    # Decay within a tile's keys, then from the last of them: all decay times at the cost of one matmul.
    within = torch.arange(1 - PRUNED_KEYS, 1, device=query.device) * rates[:, None]
    beyond = (rates[:, None] * (last - query[:, None, None])).clamp(min=_LOG_ZERO)
    sums = torch.einsum("nqbk,tk->nqtb", weights, within.clamp(min=_LOG_ZERO).exp()) * beyond.exp()
    normalizer = sums.sum(-1, keepdim=True) + sink[..., None]
    negligible = (sums.cumsum(-1) <= DEFAULT_EPS * normalizer).all(1)
    first = query[0]
    decayed = rates[:, None] * (last - first) <= DEFAULT_LOG_EPS / 2
    near = (first - PRUNED_KEYS - first // NEAR_SHARE) // PRUNED_KEYS * PRUNED_KEYS
    return (negligible & decayed & (last < near)).long().cumprod(-1).sum(-1)


def _share_skipped(layer: AttentionInputs, times: Tensor, sink_key: Tensor, rule: Rule) -> Tensor:
    """``[H]`` share of the measured blocks' tiles that ``rule`` skips, by its definition."""
    k = layer.k.float()
    center = key_center(k) if layer.centers else torch.zeros_like(k[:, :1])
    log_f = (-1.0 / times).expand(1, k.shape[1], -1).clone()
    # The sink stands for the first key.
    log_f[:, 1] = -math.inf
    skipped, tiles = torch.zeros(layer.q.shape[2], dtype=torch.float64, device=k.device), 0
    for start in _query_blocks(k.shape[1]):
        end = start + PRUNED_QUERIES
        first = first_kept(
            layer.q[:, start:end].float(),
            k[:, :end] - center,
            log_f[:, :end],
            eps=DEFAULT_EPS,
            rule=rule,
            scale=layer.scale,
            block_q=PRUNED_QUERIES,
            block_k=PRUNED_KEYS,
            sink=sink_key.float() - center[:, 0],
        )
        skipped, tiles = skipped + first[0, :, 0].double() / PRUNED_KEYS, tiles + end // PRUNED_KEYS
    return skipped / tiles


def _choose(shares: Tensor, costs: Tensor, skip: float) -> Tensor:
    """Index of each head's decay time with the least sum of costs at a mean share of ``skip``: ``[L, Hf]``."""
    low, high = _LEAST_PRICE, -_LEAST_PRICE
    for _ in range(60):
        middle = (low + high) / 2.0
        chosen = (costs - math.exp(middle) * shares).argmin(-1)
        low, high = (middle, high) if _of(shares, chosen).mean() < skip else (low, middle)
    return (costs - math.exp(high) * shares).argmin(-1)


def _of(x: Tensor, chosen: Tensor) -> Tensor:
    return x.gather(-1, chosen[..., None])[..., 0]
