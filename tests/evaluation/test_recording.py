"""Recorded inputs of attention, and what is computed of them: weights, reach, decay times, pruned shares."""

import math

import pytest
import torch

from byte_models import byte_model
from foxlm import forgetting_attention
from foxlm.evaluation.gates import (
    RULES,
    attention_reach,
    attention_weights,
    decay_time_table,
    decay_times,
    skipped_shares,
)
from foxlm.evaluation.recording import AttentionInputs, record_attention
from foxlm.modeling.attention_implementations import ALL_ATTENTION_FUNCTIONS
from foxlm.modeling.versions import cache_of


def attend(layer: AttentionInputs, log_f: torch.Tensor) -> torch.Tensor:
    out = forgetting_attention(layer.q, layer.k, layer.v, log_f, scale=layer.scale)
    assert isinstance(out, torch.Tensor)
    return out


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("implementation", ["fox_reference", "sdpa", "eager"])
@pytest.mark.parametrize("gate_heads", ["query", "key_value"])
def test_recorded_inputs_reproduce_each_layer(implementation: str, gate_heads: str) -> None:
    model = byte_model(forget_gate_heads=gate_heads, use_output_gate=False, use_output_norm=False)
    model.set_attn_implementation(implementation)
    outputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.get_submodule("self_attn.o_proj").register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    assert [layer.layer for layer in layers] == [0, 1]
    for layer, output in zip(layers, outputs, strict=True):
        torch.testing.assert_close(attend(layer, layer.log_f).flatten(-2), output, rtol=1e-4, atol=1e-5)


def test_recording_can_tell_a_wrong_gate() -> None:
    """Negative control of the test above: its tolerance would notice gates of the wrong layer."""
    model = byte_model()
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    first, second = layers
    assert (attend(first, first.log_f) - attend(first, second.log_f)).abs().max() > 1e-3


def test_recording_leaves_no_trace() -> None:
    model = byte_model()
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for implementation in ("fox_reference", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match="inside"), record_attention(model):
            raise RuntimeError("inside")
        assert ALL_ATTENTION_FUNCTIONS._local_mapping == before
    with record_attention(model) as layers:
        pass
    model(tokens())
    assert layers == []


def test_recording_takes_one_of_two_models() -> None:
    model, other = byte_model(), byte_model()
    with torch.no_grad(), record_attention(model) as layers:
        other(tokens(), use_cache=False)
        assert layers == []
        model(tokens(), use_cache=False)
    assert len(layers) == 2


def test_recording_refuses_what_it_would_misread() -> None:
    model = byte_model()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padding"), record_attention(model):
        model(tokens(), attention_mask=mask)
    positions = torch.arange(40).remainder(20)[None]
    with pytest.raises(ValueError, match="packing"), record_attention(model):
        model(tokens(1), position_ids=positions, use_cache=False)
    cache = cache_of(model(tokens(), use_cache=True))
    with pytest.raises(ValueError, match="earlier tokens"), record_attention(model):
        model(tokens(), cache=cache)
    with pytest.raises(ValueError, match="FoX"), record_attention(torch.nn.Linear(2, 2)):
        pass


def test_attention_weights_stop_at_a_hard_reset() -> None:
    x = torch.randn(1, 6, 1, 4)
    log_f = torch.full((1, 6, 1), -0.1)
    log_f[0, 3] = -math.inf
    weights = attention_weights(AttentionInputs(0, x, x, x, log_f, 0.5), head=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.double))
    assert weights[3:, :3].abs().max() == 0.0


def test_attention_weights_are_the_models_own() -> None:
    model = byte_model()
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens(), use_cache=False, output_attentions=True).attentions
    for head in range(4):
        weights = attention_weights(layers[1], head, sequence=1)
        torch.testing.assert_close(weights.float(), expected[1][1, head], rtol=1e-4, atol=1e-6)


def test_decay_times() -> None:
    log_f = torch.tensor([[[-0.5, -0.001, 0.0]], [[-0.3, -0.003, 0.0]]])
    assert decay_times(log_f).tolist() == pytest.approx([2.5, 500.0, math.inf], rel=1e-6)
    model = byte_model(forget_gate="fixed", decay_time_min=2.0, decay_time_max=16.0, num_key_value_heads=4)
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    assert decay_time_table(layers).tolist() == [pytest.approx([2.0, 4.0, 8.0, 16.0], rel=1e-5)] * 2


def test_skipped_shares_drop_no_more_than_eps() -> None:
    model = byte_model(decay_time_max=4.0)
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(1, 200), use_cache=False)
    log_eps = (-3.0, -10.0)
    shares = {rule: skipped_shares(layers, log_eps, rule) for rule in RULES}
    for values in shares.values():
        assert values.shape == (2, 2, 4)
        assert (values[0] >= values[1]).all()
        assert values[0].mean() > 0.2
    assert (shares["tight"] >= shares["paper"]).all()
    assert (skipped_shares(layers, log_eps, "tight", 16, 16) <= shares["tight"]).all()


def attention_inputs(length: int, log_f: float = 0.0) -> AttentionInputs:
    """Queries and keys that like all alike, of 4 heads over 2."""
    q, k = torch.zeros(2, length, 4, 8), torch.zeros(2, length, 2, 8)
    return AttentionInputs(0, q, k, k, torch.full((2, length, 4), log_f), 1.0)


def test_reach_of_even_attention_is_a_share_of_what_is_before() -> None:
    reach = attention_reach([attention_inputs(400)], share=0.8)
    assert reach.shape == (1, 4)
    torch.testing.assert_close(reach, torch.full((1, 4), 0.8 * 300, dtype=torch.float64), rtol=0.01, atol=1.0)


def test_reach_of_geometric_attention_is_its_quantile() -> None:
    layers = [attention_inputs(2000, -1 / time) for time in (20.0, 100.0)]
    reach = attention_reach(layers, share=0.9)
    torch.testing.assert_close(reach[:, 0], math.log(10) * torch.tensor([20.0, 100.0]).double(), rtol=0.03, atol=1.0)


def test_reach_counts_what_a_token_gives_to_itself() -> None:
    """Against the definition, where much of the attention is on the query's own key."""
    layer = attention_inputs(40)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 40, 4, layer.k.shape[-1], generator=generator)
    layer = layer._replace(q=keys + torch.randn(keys.shape, generator=generator), k=keys)
    expected = []
    for head in range(4):
        weights = attention_weights(layer, head)
        weights[:, 0] = 0.0
        within = [weights[row, : row + 1].flip(0).cumsum(0) for row in range(20, 40)]
        expected.append(sum((one < 0.9 * one[-1]).sum().item() for one in within) / 20)
    torch.testing.assert_close(attention_reach([layer])[0], torch.tensor(expected, dtype=torch.float64))


def test_reach_leaves_out_the_first_key() -> None:
    layer = attention_inputs(400, -1 / 20)
    layer.k[:, 0], layer.q[:] = 1.0, 10.0
    assert attention_reach([layer]).max() < 60
    # The negative control: a key that is looked for from afar counts.
    layer.k[:, 0], layer.k[:, 1] = 0.0, 1.0
    assert attention_reach([layer]).min() > 200
