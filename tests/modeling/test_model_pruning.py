"""Pruning in a model: the configuration's options reach attention, and logit bounds from weights hold."""

import math

import pytest
import torch

from foxlm.evaluation.skipped_share import skipped_share
from foxlm.kernels import backends
from foxlm.kernels.pruning.prune import first_kept
from foxlm.kernels.reference import reference_attention
from foxlm.modeling import attention_implementations, attention_settings
from foxlm.modeling.layers.rotary import apply_rotary
from models import tiny_model, tokens


@pytest.fixture
def calls(monkeypatch):
    """What attention is called with; to the model it looks like GPU kernels."""
    seen = []

    def attend(q, k, v, decay, *, scale, dropout):
        seen.append((q, k, decay, scale))
        return reference_attention(q, k, v, decay, scale=scale, dropout=dropout)

    monkeypatch.setattr(backends, "backend_of", lambda q: backends.PYTORCH._replace(attention=attend))
    return seen


@pytest.fixture
def rules(calls, monkeypatch):
    """By which rules attention is pruned."""
    seen, prune = [], attention_implementations.prune

    def pruned(*args, **options):
        seen.append(options["rule"])
        return prune(*args, **options)

    monkeypatch.setattr(attention_implementations, "prune", pruned)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("rule", ["paper", "tight", "measured"])
@pytest.mark.parametrize("variant", ["pro", "llama", "rope", "key-value-gates"])
def test_output_differs_by_no_more_than_allowed(variant, rule, calls):
    model = tiny_model(variant, acp_rule=rule, decay_time_min=0.3, decay_time_max=0.5)
    ids = tokens(2, 300)
    model.config.acp_eps = None
    exact = model(ids).logits
    assert not any(decay.kv_start.any() for _, _, decay, _ in calls)
    calls.clear()
    model.config.acp_eps = 1e-6
    assert (model(ids).logits - exact).abs().max() < 1e-4
    assert any(decay.kv_start.any() for _, _, decay, _ in calls), "nothing was pruned"


@pytest.mark.parametrize(
    ("training", "gradients", "rule"),
    [(True, True, "measured"), (False, True, "measured"), (True, False, "measured"), (False, False, "tight")],
)
def test_only_what_may_learn_is_measured(training, gradients, rule, rules):
    model = tiny_model("llama", acp_rule="measured").train(training)
    with torch.set_grad_enabled(gradients):
        model(tokens(1, 20))
        layer = model.model.layers[0].self_attn
        layer(torch.randn(1, 20, model.config.hidden_size, dtype=model.dtype))
    assert rules == [rule] * (model.config.num_hidden_layers + 1)
    assert skipped_share(model, {"input_ids": tokens(1, 20)}) is not None
    # By the rule of training, in a pass of its own.
    assert rules[-2:] == ["measured", "tight"]


def test_prompts_are_pruned_from_a_length_on(rules, monkeypatch):
    model = tiny_model("llama")
    # One more than two sequences of 10 tokens have with these heads.
    monkeypatch.setattr(attention_settings, "_least_pairs", 2 * model.config.num_attention_heads * 50 + 1)
    for gradients, length, layers in ((False, 10, 0), (False, 11, 2), (True, 2, 2)):
        rules.clear()
        with torch.set_grad_enabled(gradients):
            model(tokens(2, length))
        assert len(rules) == layers


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
        kept.append(sum(decay.kv_start.sum().item() for _, _, decay, _ in calls))
    assert torch.allclose(exact[0], exact[1], atol=1e-2), "attention does not see a common part"
    assert kept[1] > 0.95 * kept[0] > 0


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pro", "rope", "multi-query", "key-value-gates", "olmo"])
@pytest.mark.parametrize("qk_norm", ["per_head", "shared", "all_heads"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bound_of_logits_from_the_norms_weights_holds(dtype, variant, qk_norm, calls):
    model = tiny_model(variant, qk_norm=qk_norm, dtype=dtype)
    model(tokens(2, 50))
    for layer, (q, k, _, scale) in zip(model.model.layers, calls, strict=True):
        q, k = q.double(), k.double()
        logits = scale * torch.einsum("bihd,bjhd->hbij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
        bound = layer.self_attn.logit_bound(dtype)
        assert bound.shape == ((q.shape[2],) if qk_norm != "shared" else (1,))
        assert (logits.abs().flatten(1).amax(1) <= bound).all()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pro", "shared-qk-norm", "all-heads-qk-norm", "rope", "partial-rope"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 1.0), (torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 1e-7)],
)
def test_bound_of_lengths_holds_as_they_are_rounded(dtype, size, variant):
    """Of vectors of few values, so that all elements may be rounded up, by weights that make them longest."""
    model = tiny_model(variant, head_dim=64, dtype=dtype)
    attention = model.model.layers[0].self_attn
    norm, joint = attention.q_norm, variant == "all-heads-qk-norm"
    elements = 256 if joint else 64
    count = torch.arange(1, elements + 1)
    # The first n elements alike, in the middle of others half as large, and any.
    x = torch.cat(
        [(torch.arange(elements) < count[:, None]).double() * y + z for y, z in ((1, 0), (0.5, 0.5), (-0.7, 0.3))]
    )
    # Large, so that the norm's epsilon makes nothing shorter.
    x = 50.0 * torch.cat([x, torch.randn(100, elements, dtype=torch.float64)]).to(dtype)
    worst = 0.0
    for weight in torch.linspace(1.0, 2.0, 21):
        norm.weight.fill_(size * weight)
        q = norm(x[None]).view(1, len(x), -1, 64) if joint else norm(x[None, :, None].expand(-1, -1, 4, -1))
        if attention.use_rope:
            positions = torch.randint(0, 1 << 16, (1, len(x)))
            q, _ = apply_rotary(q, q, *model.model.rotary_emb(q, positions))
        lengths = q.to(dtype).double().norm(dim=-1).amax((0, 1))
        query, _ = attention.norm_bounds(dtype)
        assert (lengths <= query).all()
        exact = norm.weight.max().double() * elements**0.5
        worst = max(worst, (lengths.max() / exact).item())
    # Negative control: rounding makes them longer than that.
    assert worst > {torch.bfloat16: 1.002, torch.float16: 1.0002}.get(dtype, 0.9999)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [1.05, 2.05, 3.05])
def test_rows_lose_no_more_by_the_bound_from_weights(weight, dtype):
    """The rule `paper` at its worst: keys to drop fit the query, its own does not, and rounding has made all longer."""
    attention = tiny_model("shared-qk-norm", head_dim=64, dtype=dtype).model.layers[0].self_attn
    attention.q_norm.weight.fill_(weight)
    attention.k_norm.weight.fill_(weight)
    count = torch.arange(1, 65)
    x = (torch.arange(64) < count[:, None]).to(dtype)
    q = attention.q_norm(x)
    x = x[q.double().norm(dim=-1).argmax()]
    far, eps = 1 << 14, 1e-12
    q, k = attention.q_norm(x), attention.k_norm(torch.cat([x.expand(far, -1), -x[None]]))
    bound = attention.logit_bound(dtype)
    logits = attention.scaling * k.double() @ q.double()
    log_f = torch.zeros(1, far + 1, 1, dtype=torch.float64)
    lost = []
    for excess in torch.linspace(-0.5, 0.02, 53).tolist():
        log_f[0, -1] = math.log(eps / (far + 1)) - 2.0 * logits.abs().max() + excess
        first = first_kept(q[None, None, None], k[None, :, None], log_f, eps=eps, rule="paper", logit_bound=bound)
        weights = (logits + log_f[0, -1, 0] * (torch.arange(far + 1) < far)).softmax(0)
        lost.append(weights[: first.item()].sum().item())
    assert 0.6 * eps < max(lost) <= eps


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
    bound = attention.logit_bound(torch.float64)[0]
    assert 0.999 * bound < largest <= bound
    query, any_logit = model.model.layers[0].logit_bounds(torch.float64)
    assert q.norm(dim=-1).max() * scale <= query[0] and largest <= any_logit[0]


def test_layers_without_rope_are_bounded_whatever_its_type():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rotated, plain = tiny_model("pro", rope_parameters=rope, nope_layers=[1]).model.layers
    assert rotated.self_attn.logit_bound(torch.float64) is None and rotated.logit_bounds(torch.float64) is None
    assert plain.self_attn.logit_bound(torch.float64) is not None and plain.logit_bounds(torch.float64) is not None


def test_there_is_no_bound_without_norms_or_with_rope_that_stretches():
    assert tiny_model("llama").model.layers[0].self_attn.logit_bound(torch.float64) is None
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert tiny_model("pro", rope_parameters=rope).model.layers[0].self_attn.logit_bound(torch.float64) is None
