"""The configuration: what it accepts, derives, refuses, and keeps when saved and loaded."""

import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from foxlm import FoxConfig, FoxForCausalLM
from fuzz import fuzz
from hostile_values import any_value
from models import ROPE, ROPE_TYPES, SIZES, VARIANTS, assert_close, rope, tiny_config, tiny_model, tokens

NAN, INF = float("nan"), float("inf")

# A valid set of parameters of each type, with a head of 8 and an original length below the tests' longest.
WRONG = [
    # field, arguments, what came, what is accepted
    *((field, {field: 0}, "0", "positive integer") for field in ("vocab_size", "num_hidden_layers", "head_dim")),
    *((field, {field: "a"}, "a", "int") for field in ("vocab_size", "hidden_size", "num_attention_heads")),
    *((field, {field: 2.5}, "2.5", "int") for field in ("intermediate_size", "max_position_embeddings")),
    *((field, {field: -1}, "-1", "positive integer") for field in ("intermediate_size", "num_key_value_heads")),
    ("hidden_size", {"hidden_size": True}, "True", "int"),
    ("hidden_size", {"hidden_size": 0}, "0", "positive integer"),
    ("hidden_size", {"hidden_size": 33, "head_dim": None}, "33 and 4", "multiple of num_attention_heads"),
    ("num_attention_heads", {"num_attention_heads": 0, "head_dim": None}, "0", "positive integer"),
    ("num_attention_heads", {"num_attention_heads": -4}, "-4", "positive integer"),
    ("num_key_value_heads", {"num_key_value_heads": 3}, "3", "divisor of num_attention_heads (4)"),
    ("num_key_value_heads", {"num_key_value_heads": 8}, "8", "divisor of num_attention_heads (4)"),
    ("max_position_embeddings", {"max_position_embeddings": 0}, "0", "positive integer"),
    ("mlp_ratio", {"mlp_ratio": -1.0, "intermediate_size": None}, "-1.0", "positive number"),
    ("mlp_ratio", {"mlp_ratio": 0, "intermediate_size": None}, "0", "positive number"),
    ("mlp_ratio", {"mlp_ratio": NAN, "intermediate_size": None}, "nan", "positive number"),
    ("mlp_ratio", {"mlp_ratio": -1.0}, "-1.0", "positive number"),
    ("hidden_act", {"hidden_act": "relux"}, "relux", "silu"),
    *((f, {f: 0.0}, "0.0", "positive number") for f in ("rms_norm_eps", "qk_norm_eps", "initializer_range")),
    *((f, {f: NAN}, "nan", "positive number") for f in ("rms_norm_eps", "qk_norm_eps", "initializer_range")),
    *((field, {field: 1}, "1", "bool") for field in ("use_cache", "tie_word_embeddings", "attention_bias")),
    *((f, {f: "yes"}, "yes", "bool") for f in ("use_key_shift", "use_value_shift", "use_output_gate")),
    *((f, {f: None}, "None", "bool") for f in ("use_output_norm", "mlp_bias")),
    *(
        (name, {name: p}, str(p), "[0, 1)")
        for name in ("attention_dropout", "classifier_dropout")
        for p in (1.0, -0.1, NAN)
    ),
    ("forget_gate", {"forget_gate": "half"}, "half", "'bias_only'"),
    ("forget_gate", {"forget_gate": None}, "None", "'none'"),
    ("forget_gate_heads", {"forget_gate_heads": "all"}, "all", "'key_value'"),
    *(("decay_time_min", {"decay_time_min": t}, str(t), "(0, 1e9]") for t in (0, -2.0, INF, NAN)),
    *(("decay_time_max", {"decay_time_max": t}, str(t), "[2.0, 1e9]") for t in (1.0, INF, NAN)),
    ("decay_time_max", {"decay_time_min": 30.0}, "20.0", "[30.0, 1e9]"),
    *(("acp_eps", {"acp_eps": x}, str(x), "or None, which turns pruning off") for x in (0, 2, 1, 0.0, -1, NAN)),
    ("decay_time_min", {"decay_time_min": "2"}, "2", "float"),
    ("qk_norm", {"qk_norm": "layer"}, "layer", "'per_head'"),
    ("qk_norm", {"qk_norm": True}, "True", "'per_head'"),
    ("output_gate_act", {"output_gate_act": "relu"}, "relu", "'silu'"),
    ("rope_parameters", {"rope_parameters": {"rope_type": "spiral"}}, "spiral", "yarn"),
    ("rope_parameters", {"rope_parameters": "yarn"}, "yarn", "dict"),
    ("rope_parameters", {"rope_parameters": {"rope_type": "linear"}}, "linear", "factor"),
    ("head_dim", {"head_dim": 7} | ROPE, "7", "even number with rope_parameters"),
    *(
        ("nope_layers", {"nope_layers": x} | ROPE, str(x), "indices of the 2 layers")
        for x in ([2], [-1], [1, 0], [0, 0])
    ),
    ("nope_layers", {"nope_layers": [0]}, "[0]", "None without rope_parameters"),
    ("nope_layers", {"nope_layers": [0.0]} | ROPE, "0.0", "int"),
    ("norm_position", {"norm_position": "both"}, "both", "'post'"),
    ("pad_token_id", {"pad_token_id": "a"}, "a", "int"),
    *((field, {field: 10**9}, "1000000000", "up to") for field in ("vocab_size", "hidden_size", "num_hidden_layers")),
    *((field, {field: 10**400}, "1000", "up to") for field in ("num_hidden_layers", "head_dim", "intermediate_size")),
    *((field, {field: 1e30}, "1e+30", "int") for field in ("num_hidden_layers", "vocab_size", "head_dim")),
    ("max_position_embeddings", {"max_position_embeddings": 10**10}, "10000000000", "up to"),
    ("mlp_ratio", {"mlp_ratio": 1e30, "intermediate_size": None}, "1e+30", "up to 1e4"),
    ("loss_chunk_size", {"loss_chunk_size": 10**19}, "10000000000000000000", "up to 2**31"),
    *(("dtype", {"dtype": x}, str(x), "bfloat16") for x in ("float99", "int8", 3, ["float32"], "nn")),
    ("torch_dtype", {"torch_dtype": "float99"}, "float99", "bfloat16"),
    *(("id2label", {"id2label": x}, str(x), "dict") for x in (7, ["a"], {"a": "b"})),
    *(("num_labels", {"num_labels": x}, str(x), "whole number") for x in (0, 10**12, 2.0, "two")),
    ("architectures", {"architectures": "FoxForCausalLM"}, "FoxForCausalLM", "list"),
    *(
        ("rope_parameters", {"rope_parameters": ROPE["rope_parameters"] | {"rope_theta": x}}, str(x), "rope_theta")
        for x in (0, NAN, "a")
    ),
]


@pytest.mark.parametrize(("field", "arguments", "came", "accepted"), WRONG)
def test_wrong_value_is_refused(field: str, arguments: dict, came: str, accepted: str) -> None:
    with pytest.raises(ValueError) as error:
        FoxConfig(**(SIZES | arguments))
    message = str(error.value)
    for part in (field, came, accepted):
        assert part in message, f"{part!r} is not in: {message}"


def test_wrong_type_is_refused_alike_when_it_is_assigned() -> None:
    config: Any = tiny_config()
    with pytest.raises(ValueError, match=r"^acp_eps must be float \| int \| None, got 'a'$"):
        config.acp_eps = "a"
    with pytest.raises(ValueError, match=r"^qk_norm must be one of \('per_head', .*\), got 'layer'$"):
        config.qk_norm = "layer"
    config.acp_eps = 2.0
    with pytest.raises(ValueError, match=r"^acp_eps must be a number in \(0, 1\), .* got 2\.0$"):
        config.validate()


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.5, NAN])
def test_wrong_partial_rotary_factor_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"(?s)rope_parameters.*partial_rotary_factor.*{factor}"):
        tiny_config(rope_parameters=rope("default") | {"partial_rotary_factor": factor})


def test_pad_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)pad_token_id.*97"):
        tiny_config(pad_token_id=97)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("num_layers", "num_hidden_layers"),
        ("norm_eps", "rms_norm_eps"),
        ("hidden_ratio", "mlp_ratio"),
        ("use_rope", "rope_parameters"),
        ("rope_base", "rope_parameters"),
        ("fgate_type", "forget_gate"),
        ("use_k_shift", "use_key_shift"),
        ("use_v_shift", "use_value_shift"),
        ("layer_types", "derived"),
        ("sliding_window", "forget gates"),
        ("no_rope_layers", "nope_layers"),
        ("forget_gates", "forget_gate"),
        ("numattention_heads", "num_attention_heads"),
        ("use_output_gates", "use_output_gate"),
        ("decay_time_maximum", "decay_time_max"),
    ],
)
def test_unknown_argument_that_looks_like_a_field_is_refused(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not a field of FoxConfig.*{instead}"):
        FoxConfig(**(SIZES | {name: 2}))


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("acp_eps", 2.0)]
)
def test_wrong_value_over_a_file_is_refused(field: str, value: Any, tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        FoxConfig.from_pretrained(tmp_path, **{field: value})
    assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=3).num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"acp_epss is not a field of FoxConfig: did you mean acp_eps\?"):
        FoxConfig.from_pretrained(tmp_path, acp_epss=0.1)


def test_unknown_fields_are_said_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    """In a file, which may be of a newer version, also those that look like a field."""
    more = {"acp_epss": 0.5, "haze": [1], "num_labels": 2, "tokenizer_class": None}
    config = FoxConfig.from_dict(tiny_config().to_dict() | more)
    assert (config.acp_eps, config.acp_epss, config.haze) == (tiny_config().acp_eps, 0.5, [1])
    assert [record.getMessage() for record in caplog.records] == [
        "FoxConfig has no field 'acp_epss', which changes nothing (did you mean acp_eps?)",
        "FoxConfig has no field 'haze', which changes nothing; is it of a newer version of foxlm?",
    ]
    assert FoxConfig.from_dict(config.to_dict()).haze == [1]
    with pytest.raises(ValueError, match="num_heads is not a field of FoxConfig: use num_attention_heads"):
        FoxConfig.from_dict(tiny_config().to_dict() | {"num_heads": 4})


@pytest.mark.fuzz
def test_any_value_makes_a_configuration_or_an_error_that_names_its_field() -> None:
    # What transformers takes as it comes, and what nothing of ours reads.
    others = ("_plan", "_files", "_key", "_defaults", "attribute_map", "model_type")
    fields = sorted(name for name in FoxConfig.__dataclass_fields__ if not name.endswith(others))

    def case(rng: random.Random) -> None:
        field, value = rng.choice(fields), any_value(rng)
        try:
            made = FoxConfig(**(SIZES | {field: value}))
        except ValueError as error:
            assert field in str(error), (field, value, error)
        else:
            assert made.num_hidden_layers <= 2**12

    fuzz(case)


def test_arguments_of_transformers_itself_are_kept() -> None:
    config = tiny_config(num_labels=5, architectures=["FoxForCausalLM"], dtype="bfloat16")
    assert config.num_labels == 5
    assert config.architectures == ["FoxForCausalLM"]
    assert config.dtype == torch.bfloat16


def test_derived_fields() -> None:
    config = FoxConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)
    assert config.layer_types == ["foxlm.modeling.forgetting_attention-6-6-key-value"] * 12


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        ({"hidden_size": 768}, 1792),  # 2/3 * 3.5 * 768 = 1792 exactly
        ({"hidden_size": 768, "use_output_gate": False}, 2048),  # 2/3 * 4 * 768 = 2048
        ({"hidden_size": 768, "mlp_ratio": 3.6}, 2048),  # 1843 rounded up
        ({"hidden_size": 768, "mlp_ratio": 4}, 2048),
        ({"hidden_size": 96, "num_attention_heads": 6}, 256),
        ({"hidden_size": 768, "intermediate_size": 100}, 100),
    ],
)
def test_intermediate_size(arguments: dict, width: int) -> None:
    assert FoxConfig(**arguments).intermediate_size == width


@pytest.mark.parametrize(
    ("gate", "heads", "count"),
    [("full", "query", 4), ("fixed", "key_value", 2), ("bias_only", "key_value", 2), ("none", "query", 1)],
)
def test_number_of_gates(gate: str, heads: str, count: int) -> None:
    assert tiny_config(forget_gate=gate, forget_gate_heads=heads).num_forget_gates == count


def count_parameters(hidden: int, layers: int, heads: int, width: int, pro: bool) -> int:
    """Counted by hand from the paper's description of the two blocks."""
    attention = 4 * hidden * hidden  # q, k, v, o
    gate = hidden * heads + heads
    mlp = 3 * hidden * width
    norms = 2 * hidden
    extra = 0
    if pro:
        extra += hidden * hidden  # output gate
        extra += 2 * hidden * heads  # the alphas of keys and values
        extra += 3 * hidden  # norms of q, k and the output, over all heads
    embeddings = 2 * 50304 * hidden
    return embeddings + layers * (attention + gate + mlp + norms + extra) + hidden


@pytest.mark.parametrize(
    ("name", "hidden", "layers", "heads", "width"),
    [
        ("pro-125m", 768, 12, 12, 1792),
        ("pro-360m", 1024, 24, 16, 2560),
        ("pro-760m", 1536, 24, 24, 3584),
        ("llama-125m", 768, 12, 12, 2048),
        ("llama-360m", 1024, 24, 16, 2816),
        ("llama-760m", 1536, 24, 24, 4096),
    ],
)
def test_preset(name: str, hidden: int, layers: int, heads: int, width: int) -> None:
    config = FoxConfig.preset(name)
    pro = name.startswith("pro")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (hidden, layers, heads)
    assert (config.head_dim, config.intermediate_size, config.num_key_value_heads) == (64, width, heads)
    assert config.qk_norm == ("per_head" if pro else "none")
    parts = (config.use_key_shift, config.use_value_shift, config.use_output_gate, config.use_output_norm)
    assert parts == (pro,) * 4
    assert config.forget_gate == "full" and config.rope_parameters is None
    with torch.device("meta"):
        model = FoxForCausalLM(config)
    assert model.num_parameters() == count_parameters(hidden, layers, heads, width, pro)


def test_preset_takes_overrides_and_refuses_unknown_names() -> None:
    config = FoxConfig.preset("llama-125m", num_hidden_layers=2, use_output_gate=True)
    assert (config.num_hidden_layers, config.use_output_gate, config.hidden_size) == (2, True, 768)
    with pytest.raises(ValueError, match=r"name must be one of .*'llama-125m'.*got 'pro-7b'"):
        FoxConfig.preset("pro-7b")
    with pytest.raises(ValueError, match="num_heads is not a field"):
        FoxConfig.preset("pro-125m", num_heads=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path) -> None:
    config = tiny_config(variant, dtype="bfloat16", num_labels=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FoxConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    for field, value in (SIZES | VARIANTS[variant]).items():
        assert getattr(loaded, field) == value, field
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_no_rope_stays_no_rope(tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters is None
    assert tiny_model().model.rotary_emb is None
    changed = AutoConfig.from_pretrained(tmp_path, rope_parameters=rope("yarn"))
    assert changed.rope_parameters["rope_type"] == "yarn"


def test_default_configuration_of_a_model_type() -> None:
    config = AutoConfig.for_model("fox", num_hidden_layers=3)
    assert type(config) is FoxConfig and config.num_hidden_layers == 3
    assert config.rope_parameters is None


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rope_type_builds_runs_and_matters(rope_type: str, partial: float) -> None:
    parameters = rope(rope_type)
    if partial != 1.0:
        parameters["partial_rotary_factor"] = partial
        if rope_type == "longrope":
            parameters |= {"short_factor": [1.0, 2.0], "long_factor": [2.0, 5.0]}
    model = tiny_model("pro", rope_parameters=parameters)
    without = tiny_model("pro")
    without.load_state_dict(model.state_dict())
    ids = tokens(1, 9)
    with torch.no_grad():
        logits, plain = model(ids).logits, without(ids).logits
        beyond = model(tokens(1, 150)).logits
    assert logits.isfinite().all() and beyond.isfinite().all()
    assert_close(logits[:, 0], plain[:, 0])
    assert (logits - plain).abs().max() > 1e-3
    # RoPE is relative: where the sequence begins changes nothing (unless the length picks the frequencies).
    if rope_type not in ("dynamic", "longrope"):
        moved = model(ids, position_ids=torch.arange(20, 29)[None]).logits
        # transformers computes cosines in float32
        assert_close(moved, logits, 1e-4)


def test_rope_keeps_the_rest_of_a_head_in_place() -> None:
    model = tiny_model("partial-rope")
    inverse = model.model.rotary_emb.inv_freq
    assert_close(inverse, torch.tensor([1.0, 100.0**-0.5]), 1e-6)
    cos, _ = model.model.rotary_emb(torch.zeros(1, 3, 8), torch.arange(3)[None])
    assert cos.shape == (1, 3, 4)
    assert math.isclose(cos[0, 2, 1].item(), math.cos(2 * 0.1), rel_tol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_plan_covers_the_heads(variant: str) -> None:
    """Every planned name exists, and every weight of the attention is planned for, or none but the projections."""
    config = tiny_config(**VARIANTS[variant])
    model = FoxForCausalLM(config).model
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    plan = {key.replace("*", "0") for key in config.base_model_tp_plan}
    assert plan <= names
    attention = [name for name, _ in model.named_parameters() if name.startswith("layers.0.self_attn.")]
    unplanned = {name for name in attention if name not in plan and name.rsplit(".", 1)[0] not in plan}
    assert not unplanned or config.qk_norm == "all_heads"


def test_norms_over_all_heads_see_all_heads_on_every_rank() -> None:
    plan = tiny_config("olmo").base_model_tp_plan
    attention = {key.split(".")[-1]: style for key, style in plan.items() if "self_attn" in key}
    assert attention == dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output") | {
        "o_proj": "rowwise_split_input"
    }


def test_whole_numbers_are_taken_for_floats() -> None:
    config = tiny_config(rms_norm_eps=1, qk_norm_eps=1, initializer_range=1)
    assert (config.rms_norm_eps, config.qk_norm_eps, config.initializer_range) == (1, 1, 1)
