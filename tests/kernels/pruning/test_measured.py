"""Measured pruning: kernels against the definition, and weights that are on the threshold but for a rounding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_inputs import padding_mask
from foxlm.kernels.backends import PYTORCH, backend_of
from foxlm.kernels.decay import Decay, accumulate, hide_padding, sequence_starts, without_padding
from foxlm.kernels.pruning.prune import prune
from foxlm.kernels.pruning.rules import centered
from foxlm.kernels.tiles import PRUNED_KEYS
from kernel_device import DEVICES

EPS = math.exp(-10)


@pytest.fixture(params=DEVICES, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(
    keys: int, queries: int, heads: tuple[int, int, int], dtype: torch.dtype, head_dim: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, log_f`` whose logits are far below their bound, with heads that forget in 10 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    h, g, hf = heads
    q = 2.0 * torch.randn(2, queries, h, head_dim, generator=generator)
    k = torch.randn(2, keys, g, head_dim, generator=generator)
    log_f = -torch.rand(2, keys, hf, generator=generator) * torch.linspace(0.05, 0.2, hf)
    return q.to(dtype), k.to(dtype), log_f


def decay_of(log_f: Tensor, queries: int, hidden: str = "nothing") -> Decay:
    keys = log_f.shape[1]
    starts = None
    if hidden == "packed":
        starts = sequence_starts(torch.tensor([0, 100, 200, keys]), keys).expand(2, -1)
    c, first = accumulate(log_f, starts=starts)
    decay = Decay(c[..., keys - queries :], c, first[..., keys - queries :], torch.arange(keys - queries, keys))
    return hide_padding(decay, padding_mask(hidden, 2, keys).bool()) if hidden in ("left", "holes") else decay


def found(q: Tensor, k: Tensor, decay: Decay, device: str, **options: Any) -> Tensor:
    """First keys by what runs on ``device``."""
    q, k, decay = q.to(device), k.to(device), Decay(*(x.to(device) for x in decay))
    return prune(decay, q, k, scale=0.25, **options, search=backend_of(q).search_kv_start).kv_start.cpu()


@pytest.mark.parametrize("hidden", ["nothing", "packed", "left", "holes"])
@pytest.mark.parametrize(("queries", "heads"), [(700, (2, 2, 2)), (150, (4, 2, 4)), (150, (4, 2, 1))], ids=str)
def test_blocks_are_dropped_as_defined(device, queries, heads, hidden):
    q, k, log_f = draw(700, queries, heads, torch.float16)
    decay = decay_of(log_f, queries, hidden)
    if hidden in ("left", "holes"):
        # As attention does: what stands in padding counts for nothing.
        q, k, _ = without_padding(q, k, k, decay, padding_mask(hidden, 2, 700).bool())
    first = found(q, k, decay, device, eps=EPS, rule="measured")
    # With a little more than all margins less and more.
    least, most = (prune(decay, q, k, eps=EPS * x, rule="measured", scale=0.25).kv_start for x in (0.99, 1.01))
    assert (least <= first).all() and (first <= most).all()
    tight = found(q, k, decay, device, eps=EPS, rule="tight")
    assert (tight <= first).all() and (tight < first).any()


@pytest.mark.parametrize("head_dim", [16, 40])
def test_wider_inputs_are_measured_with_a_larger_margin(device, head_dim):
    """Float32 queries, and keys that were centered: rounded to bfloat16 on the way."""
    q, k, log_f = draw(700, 700, (2, 1, 2), torch.float32, head_dim)
    decay = decay_of(log_f, 700)
    for queries, keys in ((q, k), (q.half(), centered(k.half() + 1.0))):
        first = found(queries, keys, decay, device, eps=EPS, rule="measured")
        least, most = (
            prune(decay, queries, keys, eps=x, rule="measured", scale=0.25).kv_start for x in (EPS / 3.0, 1.01 * EPS)
        )
        assert (least <= first).all() and (first <= most).all()
        assert (found(queries, keys, decay, device, eps=EPS, rule="tight") < first).any()


@pytest.mark.parametrize(("part", "start"), [(0.99, 192), (0.996, 128)])
def test_what_the_bound_dropped_counts(device, part, start):
    """It has all of ``eps`` relative to the own key, 1 / 130 of it relative to the 129 nearest ones."""
    keys, queries = 576, 64
    q, k, log_f = torch.zeros(1, queries, 1, 16), torch.zeros(1, keys, 1, 16), torch.zeros(1, keys, 1)
    dropped = 128.0 * math.exp(-14.0)
    eps = 1.01 * dropped
    log_f[:, 192] = math.log(part * 129.0 * eps / 64.0)
    log_f[:, 128] = -14.0 - log_f[:, 192]
    first = [found(q, k, decay_of(log_f, queries), device, eps=eps, rule=rule) for rule in ("tight", "measured")]
    assert (first[0] == 128).all() and (first[1] == start).all()


def lost_on_the_threshold(device: str, seed: int) -> float:
    """How much more than ``eps``, as a share of it, the last query loses where exactly that much is too much."""
    generator = torch.Generator().manual_seed(seed)
    keys = 384
    q = 8.0 * torch.randn(1, 1, 1, 32, generator=generator).half()
    k = torch.randn(1, keys, 1, 32, generator=generator).half()
    log_f = torch.zeros(1, keys, 1)
    log_f[:, 256] = -40.0
    decay = decay_of(log_f, 1)
    weights = (0.25 * (q[0, 0, 0].double() @ k[0, :, 0].double().T) + decay.bias()[0, 0, 0]).softmax(-1)
    boundary = PRUNED_KEYS * (1 + seed % 4)
    eps = weights[:boundary].sum().item() * (1.0 - 1e-7)
    first = int(found(q, k, decay, device, eps=eps, rule="measured"))
    return weights[:first].sum().item() / eps - 1.0


def test_rounding_loses_no_more_than_eps(device):
    assert max(lost_on_the_threshold(device, seed) for seed in range(12)) <= 0.0


def test_without_margins_rounding_would(device, monkeypatch):
    if backend_of(torch.empty(0, 16, dtype=torch.float16, device=device)) is PYTORCH:
        pytest.skip("the definition computes in float64")
    monkeypatch.setattr("foxlm.kernels.pruning.triton_measured.logit_margin", lambda head_dim, dtype: 0.0)
    monkeypatch.setattr("foxlm.kernels.pruning.triton_measured.log_measured", lambda eps, dtype, keys: math.log(eps))
    assert max(lost_on_the_threshold(device, seed) for seed in range(12)) > 0.0


def test_heads_that_do_not_forget_are_not_measured(device):
    """Content alone would let keys be dropped; to find out would cost those heads for which it does not."""
    q, k, log_f = draw(512, 512, (1, 1, 1), torch.float16)
    k[:, :256] -= 20.0 * q.mean(1, keepdim=True)
    first = found(q, k, decay_of(0.001 * log_f, 512), device, eps=EPS, rule="measured")
    assert not first.any()
