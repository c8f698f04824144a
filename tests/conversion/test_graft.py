"""Grafting: open gates give the base model's outputs; what cannot be represented is refused by name."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from base_models import BASES, SIX, SIZES, base, logits
from foxlm import FoxForCausalLM
from foxlm.conversion.graft import graft, graft_to_folder
from models import assert_close, rope, tokens


def gates(model: FoxForCausalLM) -> Tensor:
    """``[layers, gates]`` log gates of a random input."""
    layers: Any = model.model.layers
    return torch.stack([layer.self_attn.log_forget_gates(torch.randn(1, 1, 32))[0, 0] for layer in layers])


# The base model's function


@pytest.mark.parametrize("output_gate", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_gates_that_never_forget_change_nothing(name: str, output_gate: bool) -> None:
    model = base(name)
    grafted = graft(model, decay_times=math.inf, output_gate=output_gate)
    # 100 tokens are more than the RoPE types that look at lengths were told of; windows hold 64.
    length = 60 if "window" in name else 100
    expected = logits(model, length)
    assert expected.std() > 0.5
    for implementation in ("fox", "sdpa", "eager"):
        grafted.set_attn_implementation(implementation)
        assert_close(logits(grafted, length), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*SIX, "llama, tied", "olmo2, biases, multi-head"])
def test_without_gates_it_is_the_base_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = base(name, dtype)
    grafted = graft(model, forget_gate="none")
    assert type(grafted) is FoxForCausalLM and grafted.config.forget_gate == "none"
    # The bias of o_proj is a zero that Qwen2 does without.
    added = grafted.state_dict().keys() ^ model.state_dict().keys()
    assert all(key.endswith("o_proj.bias") for key in added) and bool(added) == (name == "qwen2")
    assert {weight.dtype for weight in grafted.state_dict().values()} == {dtype}
    grafted.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(grafted))
    # The same weights in a base whose RoPE frequencies were not rounded with them.
    exact = base(name)
    exact.load_state_dict(model.state_dict())
    loaded = FoxForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(logits(loaded), logits(exact), 1e-5)


def test_without_gates_other_options_work() -> None:
    model = base("smollm3")
    assert_close(logits(graft(model, forget_gate="none", output_gate=True)), logits(model), 1e-5)
    without = graft(model, forget_gate="none", keep_rope=False)
    assert_close(logits(without), logits(base("smollm3", no_rope_layers=[0, 0, 0, 0])), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", SIX)
def test_one_gate_that_forgets_shows(name: str) -> None:
    """The negative control of the test above, for each layer and head."""
    model = base(name)
    expected = logits(model)
    grafted = graft(model, decay_times=math.inf)
    layers: Any = grafted.model.layers
    for layer in layers:
        bias = layer.self_attn.forget_gate.bias
        for head in range(4):
            never = bias[head].item()
            bias[head] = -math.log(math.expm1(1 / 100))
            with pytest.raises(AssertionError, match="differs"):
                assert_close(logits(grafted), expected, 1e-5)
            bias[head] = never
    assert_close(logits(grafted), expected, 1e-5)


@pytest.mark.parametrize("name", SIX)
def test_generation_with_a_cache_is_the_base_models(name: str) -> None:
    model = base(name)
    grafted = graft(model, decay_times=math.inf)
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **how)
    assert torch.equal(grafted.generate(ids, **how), expected)
    assert torch.equal(grafted.generate(ids, cache_implementation="static", **how), expected)
    assert torch.equal(grafted.generate(ids, num_beams=2, **how), model.generate(ids, num_beams=2, **how))


def test_frequencies_are_the_base_models_to_the_bit() -> None:
    """One unit in the last place would be 5e-4 of an angle at 8,192 tokens."""
    model = base()
    assert torch.equal(graft(model).model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SIX)
def test_type_is_kept_and_gates_are_float32_at_least(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = base(name, dtype)
    grafted = graft(model, decay_times=math.inf, output_gate=True)
    wide = torch.promote_types(dtype, torch.float32)
    for key, weight in grafted.state_dict().items():
        assert weight.dtype == (wide if "forget_gate" in key else dtype), key
    assert grafted.dtype == grafted.config.dtype == dtype
    exact = logits(base(name, torch.float64))
    error, theirs = ((logits(x).double() - exact).norm() / exact.norm() for x in (grafted, model))
    # Their norms are float32 in a float64 model.
    assert error <= max(1.5 * theirs, 1e-6)
    grafted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is FoxForCausalLM and loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(grafted))


def test_base_stays_as_it_was() -> None:
    model = base("llama, tied")
    expected = logits(model)
    grafted = graft(model, output_gate=True)
    assert grafted.lm_head.weight is grafted.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in grafted.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)


def test_without_rope_it_is_another_model() -> None:
    grafted = graft(base("smollm3"), decay_times=math.inf, keep_rope=False)
    assert grafted.config.rope_parameters is None and grafted.config.nope_layers is None
    expected = logits(base("smollm3", no_rope_layers=[0, 0, 0, 0]))
    assert_close(logits(grafted), expected, 1e-5)
    assert (expected - logits(base("smollm3"))).abs().max() > 0.1


def test_stretched_rope_is_that_of_the_base_stretched() -> None:
    model = base("llama")
    grafted = graft(model, decay_times=math.inf, rope_factor=4)
    context = model.config.max_position_embeddings
    assert grafted.config.max_position_embeddings == 4 * context
    config = copy.deepcopy(model.config)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": context, "attention_factor": 1.0}
    config.rope_parameters = config.rope_parameters | yarn
    stretched: Any = type(model)(config).eval()
    stretched.load_state_dict(model.state_dict())
    assert_close(logits(grafted, 100), logits(stretched, 100), 1e-5)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(logits(grafted, 100), logits(model, 100), 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"rope_factor": 1.0}, "rope_factor must be a number above 1, got 1.0"),
        ("llama", {"rope_factor": math.inf}, "rope_factor must be a number above 1, got inf"),
        ("llama", {"rope_factor": "4"}, "rope_factor must be a number above 1, got '4'"),
        ("llama", {"rope_factor": 4, "keep_rope": False}, "rope_factor needs .* type 'default', got 'none'"),
        ("llama, yarn", {"rope_factor": 4}, "rope_factor needs .* type 'default', got 'yarn'"),
    ],
)
def test_rope_that_cannot_be_stretched_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graft(base(name), **options)


# Gates


@pytest.mark.parametrize("heads", ["query", "key_value"])
@pytest.mark.parametrize("gate", ["full", "bias_only", "fixed"])
def test_each_gate_starts_from_its_decay_time(gate: str, heads: str) -> None:
    count = 4 if heads == "query" else 2
    ratio = (800.0 / 0.1) ** (1 / (count - 1))
    spaced = torch.tensor([0.1 * ratio**i for i in range(count)]).expand(4, count)
    table = torch.rand(4, count, generator=torch.Generator().manual_seed(1)) * 1e3 + 0.01
    cases: list[tuple[Any, Tensor]] = [
        ((0.1, 800.0), spaced),
        ([0.1, 800], spaced),
        (7, torch.full((4, count), 7.0)),
        (torch.tensor(7), torch.full((4, count), 7.0)),
        (table, table),
        (table.tolist(), table),
        (table.numpy(), table),
        (None, torch.tensor([64.0 * (16 * 64 / 64) ** (i / (count - 1)) for i in range(count)]).expand(4, count)),
    ]
    for given, times in cases:
        grafted = graft(base(), decay_times=given, forget_gate=gate, forget_gate_heads=heads)
        assert_close(gates(grafted) * times, torch.full((4, count), -1.0), 1e-5)
        assert grafted.config.decay_time_min == pytest.approx(times.min().item(), rel=1e-5)
        assert grafted.config.decay_time_max == pytest.approx(times.max().item(), rel=1e-5)
        biases = [p for name, p in grafted.named_parameters() if name.endswith("forget_gate.bias")]
        assert all(p.requires_grad == (gate != "fixed") for p in biases)


@pytest.mark.parametrize("gate", ["full", "bias_only"])
def test_infinite_gates_stay_and_others_learn(gate: str) -> None:
    times = torch.full((4, 4), 5.0)
    times[1, 2] = math.inf
    model = graft(base(), decay_times=times, forget_gate=gate).train()
    assert (gates(model) == 0).nonzero().tolist() == [[1, 2]]
    assert (model.config.decay_time_min, model.config.decay_time_max) == (5.0, 1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = tokens(2, 20)
    before = gates(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()
    moved = gates(model) != before
    assert (~moved).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0.0, "positive, got 0.0"),
        (-3, "positive, got -3.0"),
        (math.nan, "positive, got nan"),
        ((64, -1), "positive, got -1.0"),
        ((-math.inf, 5), "positive, got -inf"),
        ((math.nan, 5), "positive, got nan"),
        ((1000, 64), "got min 1000.0 and max 64.0"),
        ((64, math.inf), "got min 64.0 and max inf"),
        ((1, 2, 3), r"got shape \[3\]"),
        (torch.ones(4, 2), r"shape \[4, 4\], got shape \[4, 2\]"),
        (torch.ones(3, 4), r"shape \[4, 4\], got shape \[3, 4\]"),
        (torch.ones(1), r"got shape \[1\]"),
        ([[1.0] * 4] * 3 + [[1.0] * 3], "expected sequence of length 4"),
        ([[1.0] * 4] * 3 + [[1.0, 2.0, 0.0, 4.0]], "positive, got 0.0"),
        ("fast", "got 'fast'"),
        (1j, "got 1j"),
        ([], r"got shape \[0\]"),
        ({"min": 3}, "got {'min': 3}"),
    ],
)
def test_wrong_decay_times_are_refused(times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"decay_times must be .*{message}"):
        graft(base(), decay_times=times)


@pytest.mark.parametrize("times", [math.inf, 0, (64, 1024)])
def test_decay_times_of_no_gates_are_refused(times: Any) -> None:
    with pytest.raises(ValueError, match="decay_times has no effect with forget_gate 'none'"):
        graft(base(), forget_gate="none", decay_times=times)


@pytest.mark.parametrize(
    ("option", "value"), [("forget_gate", "half"), ("forget_gate", None), ("forget_gate_heads", "all")]
)
def test_wrong_gates_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}.* one of .*(full|query).* got .*{value}"):
        graft(base(), **{option: value})


# What is carried over, and what is refused


def test_configuration_says_what_the_base_is() -> None:
    model = base("qwen2", eos_token_id=[2, 5], attention_dropout=0.25, max_position_embeddings=77)
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    grafted = graft(model)
    config = grafted.config
    for field in ("eos_token_id", "attention_dropout", "max_position_embeddings", "vocab_size", "initializer_range"):
        assert getattr(config, field) == getattr(model.config, field), field
    assert config.rope_parameters == model.config.rope_parameters
    assert (config.head_dim, config.num_key_value_heads, config.qk_norm) == (8, 2, "none")
    assert grafted.generation_config.temperature == 0.3
    assert graft(base("smollm3")).config.nope_layers == [3]
    assert graft(base("olmo2")).config.norm_position == "post"


WINDOWED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 63}, "sliding_window"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, "sliding_window"),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, "sliding_window"),
    ("smollm3", {"sliding_window": 8, "use_sliding_window": True}, "sliding_window"),
    ("qwen3", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("name", "fields", "named"), WINDOWED)
def test_windows_are_refused(name: str, fields: dict, named: str) -> None:
    model = base(name)
    model.config = type(model.config)(**(SIZES | BASES[name][1] | fields))
    with pytest.raises(ValueError, match=rf"{named} must be .*got"):
        graft(model)


def test_window_that_no_layer_has_is_none() -> None:
    model = base("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4)
    assert_close(logits(graft(model, decay_times=math.inf)), logits(model), 1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"sliding_window": 8}, "not known: sliding_window; remove those that nothing depends on"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved must be False, got True"),
        ("llama", {"is_causal": False}, "not known: is_causal"),
        ("olmo2", {"clip_qkv": 8.0}, "not known: clip_qkv"),
        ("qwen2", {"use_mrope": True}, "use_mrope must be False, got True"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent"),
        ("llama", {"pad_token_id": -1}, "pad_token_id must be .*got -1"),
        ("llama", {"rope_parameters": rope("default") | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_fields_that_cannot_be_represented_are_refused(name: str, fields: dict, message: str) -> None:
    model = base(name)
    for field, value in fields.items():
        setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        graft(model)


def test_other_models_are_refused() -> None:
    sizes = SIZES | {"num_local_experts": 2}
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    with pytest.raises(ValueError, match=r"model_type must be one of \['llama', .*'smollm3'\], got 'mixtral'"):
        graft(mixtral)
    with pytest.raises(ValueError, match=r"model_type must be .*got 'fox'"):
        graft(graft(base()))
    with pytest.raises(ValueError, match="model must be a LlamaForCausalLM, got LlamaModel"):
        graft(base().model)
    with pytest.raises(ValueError, match=r"model must be .*got NoneType"):
        graft(None)


def cast_a_norm(model: Any) -> str:
    model.model.norm.bfloat16()
    return r"model\.norm\.weight"


def add_a_weight(model: Any) -> str:
    model.model.layers[1].self_attn.q_proj.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    return r"layers\.1\.self_attn\.q_proj\.scale"


def lose_a_weight(model: Any) -> str:
    del model.model.layers[2].mlp.up_proj.weight
    return r"layers\.2\.mlp\.up_proj\.weight"


def reshape_a_weight(model: Any) -> str:
    model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(47, 32))
    return r"layers\.2\.mlp\.up_proj\.weight"


def offload_a_weight(model: Any) -> str:
    model.model.layers[3].mlp.to("meta")
    return r"layers\.3\.mlp.* on meta"


def untie(model: Any) -> str:
    model.config.tie_word_embeddings = True
    return r"lm_head\.weight must be model\.embed_tokens\.weight with tie_word_embeddings"


@pytest.mark.parametrize("spoil", [cast_a_norm, add_a_weight, lose_a_weight, reshape_a_weight, offload_a_weight, untie])
def test_weights_that_do_not_fit_are_named(spoil: Callable[[Any], str]) -> None:
    model = base()
    named = spoil(model)
    with pytest.raises(ValueError, match=named):
        graft(model)


# Folders


def test_folder_is_grafted_as_the_model(tmp_path: Path) -> None:
    model = base("qwen3", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for source in (tmp_path / "base", str(tmp_path / "base")):
        grafted = graft(source, decay_times=(3, 30))
        assert grafted.dtype == torch.bfloat16
        assert torch.equal(logits(grafted), logits(graft(model, decay_times=(3, 30))))
    graft_to_folder(tmp_path / "base", tmp_path / "out", decay_times=(3, 30))
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(grafted))
    assert AutoConfig.from_pretrained(tmp_path / "out").decay_time_max == 30.0


def test_folder_with_weights_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    model = base()
    weights = model.state_dict()
    del weights["model.layers.3.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "less", state_dict=weights)
    with pytest.raises(ValueError, match=r"missing_keys model\.layers\.3\.mlp\.up_proj\.weight"):
        graft(tmp_path / "less")
    model.save_pretrained(tmp_path / "more", state_dict=model.state_dict() | {"model.norm.bias": torch.ones(32)})
    with pytest.raises(ValueError, match=r"unexpected_keys model\.norm\.bias"):
        graft(tmp_path / "more")
    model.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"mismatched_keys .*mlp\.down_proj\.weight"):
        graft(tmp_path / "other")


@pytest.mark.parametrize("source", ["nobody/nothing", "no/such/folder", ""])
def test_model_that_is_nowhere_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model must be a folder, or the name of a model|must hold a config.json"):
        graft(source)


def test_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="decay_times"):
        graft_to_folder(tmp_path / "base", tmp_path / "out", decay_times=0)
    with pytest.raises(ValueError, match="there already"):
        graft_to_folder(tmp_path / "base", tmp_path / "base")
    # Nor folders above it.
    with pytest.raises(ValueError, match="decay_times must be positive"):
        graft_to_folder(tmp_path / "base", tmp_path / "new" / "out", decay_times=0)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
