"""Pruning at its threshold, a rounding more or less: no row loses more than ``eps``, and what is below is skipped.

In PyTorch on the CPU, by kernels on a GPU, and by kernels on the CPU in Triton's interpreter (`make test-slow`).
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import HAS_TRITON, backend_of
from foxlm.kernels.decay import Decay
from foxlm.kernels.pruning.key_stats import KeySummary, empty_summary, extend_summary
from foxlm.kernels.pruning.later_queries import first_needed_block, future_query_bounds
from foxlm.kernels.pruning.prune import first_kept, prune
from foxlm.kernels.pruning.rounding import logit_margin
from foxlm.kernels.pruning.rules import Rule
from kernel_device import DEVICES, INTERPRETED
from one_rank import Alone
from thresholds import BLOCK, SCALE, Threshold, on_threshold

if HAS_TRITON:
    from foxlm.kernels.portable import decode, decode_attend

EPS, HEAD_DIM = 1e-15, 16
RULES: list[Rule] = ["paper", "tight"]
# As multiples of the logit's size, in nats; and so far below that no margin may keep it.
EXCESS = (0.0, 2.0**-53, 2.0**-50, 2.0**-26, 2.0**-24, 2.0**-22, 2.0**-20)


@pytest.fixture(params=DEVICES, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def margin_of(size: float, dtype: torch.dtype) -> float:
    """More nats than all margins together, where the own key is 8 times as long as the others."""
    wide = torch.promote_types(dtype, torch.float32)
    return 40.0 * logit_margin(HEAD_DIM, wide) * size + 5e4 * torch.finfo(wide).eps + 1e-10


def case_of(rule: Rule, own: str, size: float, dtype: torch.dtype, **options: Any) -> Threshold:
    excess = [size * x for x in EXCESS] + [-margin_of(size, dtype)]
    return on_threshold(rule, own, size, excess, dtype=dtype, eps=EPS, head_dim=HEAD_DIM, **options)


# ---- Wherever it is decided: the first key that each head keeps, ``[H]``


def by_definition(case: Threshold, rule: Rule, device: str) -> Tensor:
    q, k, log_f = (x.to(device) for x in (case.q, case.k, case.log_f))
    first = first_kept(q, k, log_f, eps=EPS, rule=rule, scale=SCALE, block_k=BLOCK, **bound_of(case, rule, device))
    return torch.maximum(first[0, :, 0].cpu(), case.decay.kv_start[0, :, 0])


def by_attention(case: Threshold, rule: Rule, device: str) -> Tensor:
    q, k, decay = moved(case, device)
    options: Any = {"eps": EPS, "rule": rule, "scale": SCALE, **bound_of(case, rule, device)}
    return prune(decay, q, k, **options, search=backend_of(q).search_kv_start).kv_start[0, :, 0].cpu()


def by_ranks(case: Threshold, rule: Rule, device: str) -> Tensor:
    """Of the last of as many queries as keys; the others are zero."""
    q, k, decay = moved(case, device)
    tokens, heads = k.shape[1], q.shape[2]
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, tokens - 1, 0))
    first = torch.nn.functional.pad(decay.kv_start.expand(-1, heads, -1), (tokens - 1, 0))
    decay = Decay(decay.key, decay.key, first, torch.arange(tokens, device=device))
    options: Any = {"eps": EPS, "rule": rule, "scale": SCALE, **bound_of(case, rule, device)}
    options.setdefault("logit_bound", None)
    return Alone(tokens).prune(decay, q, k, **options, backend=backend_of(q)).kv_start[0, :, -1].cpu()


def by_decoding(case: Threshold, rule: Rule, device: str) -> Tensor:
    """What `decode_search` finds, which `decode_attend` would read."""
    q, k, decay = moved(case, device)
    options: dict[str, Any] = bound_of(case, rule, device) or {"logit_bound": case.bounds.max().item()}
    found = []

    class Seen:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **given: found.append(given["RANGES"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attend, "_decode_attend_kernel", Seen())
        summary = summary_of(k, decay.key)
        decode.decode_attention(q, k, k, decay, scale=SCALE, summary=summary, eps=EPS, rule=rule, **options)
    first = (BLOCK * found[0][0].cpu()).long().repeat_interleave(q.shape[2] // k.shape[2])
    return torch.maximum(first, case.decay.kv_start[0, :, 0])


def by_paging(case: Threshold, rule: Rule, device: str) -> Tensor:
    q, k, decay = moved(case, device)
    summary, last = summary_of(k, decay.key), k.shape[1] - 1
    bounds = [x.to(device) for x in (SCALE * case.q[0, 0].double().norm(dim=-1), bound_of_all(case))]
    to_come = future_query_bounds((bounds[0], bounds[1]), q.shape[2], HEAD_DIM)
    options: Any = {"eps": EPS, "rule": rule, "keys": last + 1}
    dead = first_needed_block(decay.key[..., -1], summary, to_come, last // BLOCK, **options)
    first = (BLOCK * dead[0].cpu()).long().repeat_interleave(q.shape[2] // k.shape[2])
    return torch.maximum(first, case.decay.kv_start[0, :, 0])


class Place(NamedTuple):
    find: Callable[[Threshold, Rule, str], Tensor]
    # Whether each query head finds a first key of its own.
    per_head: bool
    # Whether it runs on kernels, if there are any.
    kernels: bool


PLACES = {
    "definition": Place(by_definition, True, False),
    "attention": Place(by_attention, True, True),
    "ranks": Place(by_ranks, True, True),
    "decoding": Place(by_decoding, False, True),
    "paging": Place(by_paging, False, False),
}


def moved(case: Threshold, device: str) -> tuple[Tensor, Tensor, Decay]:
    query, key, first, last = (x.to(device) for x in case.decay)
    return case.q.to(device), case.k.to(device), Decay(query, key, first, last)


def bound_of(case: Threshold, rule: Rule, device: str) -> dict[str, Any]:
    """Given where the lengths of keys do not tell: the own key may be longer."""
    return {"logit_bound": case.bounds.to(device)} if rule == "paper" else {}


def bound_of_all(case: Threshold) -> Tensor:
    return case.bounds * (case.k[0, -1, 0].double().norm() / case.k[0, 0, 0].double().norm()).clamp(min=1.0)


def summary_of(k: Tensor, c: Tensor) -> KeySummary:
    k = k.transpose(1, 2)
    summary, running = empty_summary(c, k, k.shape[2])
    extend_summary(summary, running, c, k, 0)
    return summary


def dtypes(place: Place, device: str) -> list[torch.dtype]:
    if device == "cuda" and place.kernels:
        return [torch.float32, torch.float16, torch.bfloat16]
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    return [torch.float32, torch.float16] + ([] if INTERPRETED and place.kernels else [torch.bfloat16, torch.float64])


def cases(place: Place, device: str, rule: Rule) -> list[Threshold]:
    """Every size, type and kind of own key, not with each other."""
    if not place.kernels and INTERPRETED:
        # The ordinary run has them.
        return []
    owns = ["equal", "opposed", "orthogonal"] if rule == "tight" else ["opposed"]
    sizes = [1.0, 9.0, 76.0, 2.5e3, 2.5e5, 2.2e6, 2.5e7]
    found = []
    for number, (own, size) in enumerate((own, size) for own in owns for size in sizes):
        if own != "equal" and size > (3e5 if INTERPRETED else 3e6):
            continue
        for dtype in dtypes(place, device)[number % 2 :: 2] if INTERPRETED else dtypes(place, device):
            options: dict[str, Any] = {"kv_heads": 1 if place.per_head else 8, "seed": number}
            options["direction"] = ["one-hot", "ones", "random"][number % 3]
            options["past"] = number % 4 == 3
            options["blocks"] = 2 if options["past"] or not INTERPRETED else 1
            if place.find is by_ranks:
                options["blocks"] = 2
            elif place.find is not by_definition:
                options["hidden"] = ["nothing", "padding", "packed"][number % 3]
            found.append(case_of(rule, own, size, dtype, **options))
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PLACES)
def test_no_row_loses_more_than_eps_on_the_threshold(device: str, name: str, rule: Rule) -> None:
    place = PLACES[name]
    if name == "decoding" and device == "cpu" and not INTERPRETED:
        pytest.skip("is done by kernels")
    for case in cases(place, device, rule):
        first = place.find(case, rule, device)
        assert case.lost(first).max() <= EPS
        assert (first <= case.k.shape[1] - 1).all()


def on_the_rules_own(name: str, rule: Rule, size: float, seed: int) -> Threshold:
    """On the threshold of what ``name`` knows: of queries to come, only that the own logit is not below the bound."""
    place = PLACES[name]
    own = "opposed" if rule == "paper" or name == "paging" else "equal"
    options: dict[str, Any] = {"kv_heads": 1 if place.per_head else 8, "blocks": 2, "seed": seed}
    return case_of(rule, own, size, torch.float32, direction="random" if seed else "one-hot", **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PLACES)
def test_what_is_below_the_threshold_by_a_rounding_is_dropped(device: str, name: str, rule: Rule) -> None:
    if name == "decoding" and device == "cpu" and not INTERPRETED:
        pytest.skip("is done by kernels")
    for seed, size in enumerate((1.0, 76.0, 2.5e3)):
        case = on_the_rules_own(name, rule, size, seed)
        assert PLACES[name].find(case, rule, device)[-1] == 2 * BLOCK
        assert margin_of(size, torch.float32) < 0.01 + size * 1e-3


@pytest.mark.parametrize("name", PLACES)
def test_without_margins_rows_lose_more(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    if name == "decoding" and device == "cpu" and not INTERPRETED:
        pytest.skip("is done by kernels")
    names = ("rules", "prune", "later_queries", *(("search",) if HAS_TRITON else ()))
    modules = [*(f"pruning.{name}" for name in names), "context_parallel.pruning"]
    modules += ["portable.decode", "portable.decode_search"] if HAS_TRITON else []
    without = {
        "logit_margin": lambda *_: 0.0,
        "decay_margin": lambda *_: 0.0,
        "log_allowed": lambda eps, dtype, keys=1: math.log(eps) - math.log(keys),
    }
    for module in modules:
        read = vars(importlib.import_module(f"foxlm.kernels.{module}")).keys() & without
        assert read, f"{module} has no margins"
        for margin in read:
            monkeypatch.setattr(f"foxlm.kernels.{module}.{margin}", without[margin])

    def lost(seed: int) -> float:
        case = on_the_rules_own(name, "tight", 2.5e3 + 100.0 * seed, seed)
        return case.lost(PLACES[name].find(case, "tight", device)).max().item()

    # Roundings go either way: the first that goes the wrong one.
    assert any(lost(seed) > EPS for seed in range(16))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_bound_drops_nothing_where_it_is_not_read(
    device: str, name: str, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where reading it would wait for the device."""
    if name == "decoding" and device == "cpu" and not INTERPRETED:
        pytest.skip("is done by kernels")
    if rule == "tight" and name != "paging":
        pytest.skip("has no use for a bound")
    for module in ("pruning.prune", "context_parallel.pruning", *(["portable.decode"] if HAS_TRITON else [])):
        monkeypatch.setattr(f"foxlm.kernels.{module}.check_logit_bound", lambda *_: None)
    case = on_the_rules_own(name, rule, 76.0, 0)
    case.bounds[:3] = torch.tensor([math.nan, -1.0, math.inf])
    first = PLACES[name].find(case, rule, device)
    assert first[:3].max() == 0 and first[-1] == 2 * BLOCK
