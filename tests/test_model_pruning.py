"""Pruning in a model: what the configuration says reaches attention, and the bounds that it takes from weights hold."""

import pytest
import torch

from foxlm.kernels.reference import reference_attention
from foxlm.modeling import attention_fox
from models import tiny_model, tokens


@pytest.fixture
def calls(monkeypatch):
    """What attention is called with; to the model it looks like GPU kernels."""
    seen = []

    def attend(q, k, v, decay, *, scale, dropout):
        seen.append((q, k, decay, scale))
        return reference_attention(q, k, v, decay, scale=scale, dropout=dropout)

    monkeypatch.setattr(attention_fox, "best_attention", lambda q: attend)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("rule", ["paper", "tight"])
@pytest.mark.parametrize("variant", ["pro", "llama", "rope", "key-value-gates"])
def test_output_differs_by_no_more_than_allowed(variant, rule, calls):
    model = tiny_model(variant, acp_rule=rule, decay_time_min=0.3, decay_time_max=0.5)
    ids = tokens(2, 300)
    model.config.acp_eps = None
    exact = model(ids).logits
    assert not any(decay.first.any() for _, _, decay, _ in calls)
    calls.clear()
    model.config.acp_eps = 1e-6
    assert (model(ids).logits - exact).abs().max() < 1e-4
    assert any(decay.first.any() for _, _, decay, _ in calls), "nothing was pruned"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_common_part_of_the_keys_costs_nothing_without_qk_norm(dtype, calls):
    """As biases of keys are: far larger than what the keys differ by."""
    kept, exact = [], []
    for size in (0.0, 30.0):
        model = tiny_model("llama", dtype=dtype, attention_bias=True, decay_time_min=0.3, decay_time_max=0.5)
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.fill_(size)
        model.config.acp_eps = None
        exact.append(model(tokens(2, 300)).logits)
        model.config.acp_eps = 1e-6
        calls.clear()
        assert (model(tokens(2, 300)).logits - exact[-1]).abs().max() < 1e-3
        kept.append(sum(decay.first.sum().item() for _, _, decay, _ in calls))
    assert torch.allclose(exact[0], exact[1], atol=1e-2), "attention does not see a common part"
    assert kept[1] > 0.95 * kept[0] > 0


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pro", "rope", "multi-query", "key-value-gates", "olmo"])
@pytest.mark.parametrize("qk_norm", ["per_head", "shared", "all_heads"])
def test_bound_of_logits_from_the_norms_weights_holds(variant, qk_norm, calls):
    model = tiny_model(variant, qk_norm=qk_norm)
    model(tokens(2, 50))
    for layer, (q, k, _, scale) in zip(model.model.layers, calls, strict=True):
        logits = scale * torch.einsum("bihd,bjhd->hbij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
        bound = layer.self_attn.logit_bound()
        assert bound.shape == ((q.shape[2],) if qk_norm != "shared" else (1,))
        assert (logits.abs().flatten(1).amax(1) <= bound * (1 + 1e-9)).all()


@torch.no_grad()
def test_one_head_may_have_the_length_of_all(calls):
    """Normalized over all heads, one coordinate can be ``sqrt(H D)``: ``H G`` times what a norm per head allows."""
    model = tiny_model("all-heads-qk-norm", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    for proj, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
        proj.weight[1:] = 0.0
        proj.weight[0] *= 1e4
        norm.weight.fill_(1.0)
    model(tokens(1, 20))
    q, k, _, scale = calls[0]
    largest = (scale * q[0, :, 0] @ k[0, :, 0].T).abs().max()
    bound = attention.logit_bound()[0]
    assert 0.999 * bound < largest <= bound * (1 + 1e-9)
    query, any_logit = model.model.layers[0].logit_bounds()
    assert q.norm(dim=-1).max() * scale <= query[0] and largest <= any_logit[0]


def test_layers_without_rope_are_bounded_whatever_its_type():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rotated, plain = tiny_model("pro", rope_parameters=rope, nope_layers=[1]).model.layers
    assert rotated.self_attn.logit_bound() is None and rotated.logit_bounds() is None
    assert plain.self_attn.logit_bound() is not None and plain.logit_bounds() is not None


def test_there_is_no_bound_without_norms_or_with_rope_that_stretches():
    assert tiny_model("llama").model.layers[0].self_attn.logit_bound() is None
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert tiny_model("pro", rope_parameters=rope).model.layers[0].self_attn.logit_bound() is None
