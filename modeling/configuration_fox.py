"""Configuration of the Forgetting Transformer (FoX)."""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .config_fields import (
    LARGEST,
    LARGEST_LABELS,
    drop_empty_foreign,
    is_dtype,
    is_foreign,
    is_labels,
    near_miss,
    raises_value_errors,
    unknown_fields,
    warn_unknown,
)
from .remote_code import AUTO_MAP, export_code

if TYPE_CHECKING:
    from torch import nn

DEFAULT_IMPLEMENTATION = "fox"
IMPLEMENTATIONS = (DEFAULT_IMPLEMENTATION, "fox_reference", "sdpa", "eager")
"""What ``attn_implementation`` may be: see `attention_implementations`."""
CONTEXT_PARALLEL_IMPLEMENTATIONS = (DEFAULT_IMPLEMENTATION, "fox_reference")
"""Those that compute a sequence of which each rank has a part."""
# Tensor-parallel style of a weight that all ranks hold, each for heads of its own (`parallel.tensor_parallel`).
SHARED_BY_HEADS = "fox_shared_by_heads"
# Tensor-parallel style of a projection whose outputs are summed over ranks.
SUMMED_OVER_RANKS = "fox_summed_over_ranks"
# Attention weight that a row may lose by pruning, below the rounding of bfloat16, and its natural log.
DEFAULT_LOG_EPS = -10.0
DEFAULT_EPS = math.exp(DEFAULT_LOG_EPS)
_SIZES = {
    # name: hidden size, layers, heads, as trained in the Forgetting Transformer paper (arXiv 2503.02130)
    "125m": (768, 12, 12),
    "360m": (1024, 24, 16),
    "760m": (1536, 24, 24),
}
_PRO_PARTS = {
    "qk_norm": "per_head",
    # What the papers' code has, whatever its other norms have.
    "qk_norm_eps": 1e-5,
    "use_key_shift": True,
    "use_value_shift": True,
    "use_output_gate": True,
    "use_output_norm": True,
}
_LLAMA_PARTS = {
    "qk_norm": "none",
    "use_key_shift": False,
    "use_value_shift": False,
    "use_output_gate": False,
    "use_output_norm": False,
}


def extend_peft_defaults() -> None:
    """Let PEFT, where it is imported, adapt in a FoX model what it adapts in a Llama if a user names no targets.

    PEFT keeps one mapping from model types to target modules for each of its methods, and has no call to extend them.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, mapping in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in mapping:
            mapping.setdefault(FoxConfig.model_type, mapping["llama"])


def peft_targets(model: "nn.Module | FoxConfig") -> dict[str, Any]:
    """What a LoRA of a FoX model adapts, and what it trains whole: gates that learn, and attention sinks.

    Args:
        model: a FoX model or its configuration.

    Returns:
        ``target_modules`` and ``modules_to_save`` of a configuration of PEFT.

    Raises:
        ValueError: ``model`` is neither.

    Example:
        >>> model = FoxForCausalLM(FoxConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1))
        >>> peft_targets(model)["modules_to_save"]
        ['forget_gate']
    """
    config: Any = getattr(model, "config", model)
    if getattr(config, "model_type", None) != FoxConfig.model_type:
        raise ValueError(f"model must be a FoX model or a FoxConfig, got {type(model).__name__}")
    adapted = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trained = {"forget_gate": config.gates_learn, "sink": config.attention_sink != "none"}
    return {
        "target_modules": [*adapted, "output_gate"] if config.use_output_gate else adapted,
        "modules_to_save": [name for name, learns in trained.items() if learns],
    }


@raises_value_errors
@strict
class FoxConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FoxModel`]: a decoder whose softmax attention forgets, `softmax(QK^T * scale + c_i - c_j) V`
    with `c` the running sum of log forget gates (Forgetting Transformer, arXiv 2503.02130).

    The defaults are FoX (Pro). Each Pro part is a switch of its own; [`FoxConfig.preset`] has the papers' models.

    Args:
        vocab_size (`int`, defaults to 50304): Number of tokens.
        hidden_size (`int`, defaults to 768): Width of the residual stream.
        intermediate_size (`int`, *optional*): Width of the gated MLP. `None` is 2/3 of `mlp_ratio * hidden_size`,
            rounded up to a multiple of 256.
        mlp_ratio (`float`, *optional*): Sets `intermediate_size`, and is not kept. Without either it is 3.5 with an
            output gate and 4 without, as in the paper, which keeps the number of parameters about the same.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 12): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key/value heads; `None` is one per query head.
        head_dim (`int`, *optional*): Size of a head; `None` is `hidden_size / num_attention_heads`.
        hidden_act (`str`, defaults to `"silu"`): Activation of the MLP gate.
        max_position_embeddings (`int`, defaults to 16384): Longest sequence the model is meant for. FoX has no position
            embeddings unless `rope_parameters` is set; then some RoPE types read this.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of every RMSNorm but those of QK-norm.
        use_cache (`bool`, defaults to `True`): Whether a forward pass returns a cache.
        tie_word_embeddings (`bool`, defaults to `False`): Whether input and output embeddings share a weight.
        rope_parameters (`dict`, *optional*): Rotary embeddings beside the gate, as everywhere in transformers
            (`rope_type`, `rope_theta`, ...). `None`, the default, is none: the gate carries position.
        nope_layers (`list[int]`, *optional*): Indices of layers without rotary embeddings where the others have them,
            increasing.
        norm_position (`str`, defaults to `"pre"`): Where a block has its RMSNorms: `"pre"`, before attention and MLP;
            `"post"`, after each, on what is added to the residual stream.
        attention_bias (`bool`, defaults to `False`): Biases of the q, k, v and o projections.
        mlp_bias (`bool`, defaults to `False`): Biases of the MLP projections.
        attention_dropout (`float`, defaults to 0.0): Probability of dropping an attention weight in training.
        classifier_dropout (`float`, defaults to 0.1): Probability of dropping an element of what is classified by
            `FoxForTokenClassification`, in training.
        forget_gate (`str`, defaults to `"full"`): `"full"`, `f_t = sigmoid(w . x_t + b)`; `"bias_only"`,
            `f = sigmoid(b)` with `b` learned; `"fixed"`, the same with `b` constant; `"none"`, `f = 1`: a Transformer.
        forget_gate_heads (`str`, defaults to `"query"`): `"query"`, one gate per query head; `"key_value"`, one per
            key/value head.
        decay_time_min, decay_time_max (`float`, default to 2.0 and 2048.0): Decay times, in tokens, that gates start
            from: log-spaced over the heads of each layer by the bias `b = -log(expm1(1 / T))`, so that
            `log f = -1 / T` where the input is zero. Both `1 / ln 2` is the paper's start of `full` gates, `f = 0.5`.
        attention_sink (`str`, defaults to `"none"`): `"learned"` gives each key/value head a learned key and value that
            every query sees beside its keys and no gate decays.
        sink_token_id (`int`, *optional*): A token that sinks stand for, as after `foxlm graft --calibrate`. Where a
            sequence begins with it, later tokens do not see it a second time, and its own attention is its sink's
            value. Seen in `input_ids` only.
        qk_norm (`str`, defaults to `"per_head"`): RMSNorm of queries and keys over each head: `"per_head"`, each head
            has its weights; `"shared"`, all heads share them (the authors' checkpoints). `"all_heads"`: one RMSNorm
            over all heads together. `"none"`.
        qk_norm_eps (`float`, *optional*): Epsilon of QK-norm; `None` is `rms_norm_eps`.
        use_key_shift (`bool`, defaults to `True`): Mix each key with the one before it,
            `alpha_t k_{t-1} + (1 - alpha_t) k_t` with `alpha_t = sigmoid(w . x_t)` per head, before QK-norm.
        use_value_shift (`bool`, defaults to `True`): The same for values.
        use_output_gate (`bool`, defaults to `True`): Multiply the output of attention by `output_gate_act(W x)`.
        output_gate_act (`str`, defaults to `"sigmoid"`): `"sigmoid"` or `"silu"`.
        use_output_norm (`bool`, defaults to `True`): RMSNorm of the output of each head, before the output gate.
        acp_eps (`float`, *optional*, defaults to `exp(-10)`): Adaptive Computation Pruning (arXiv 2504.06949): the
            attention weight that a query may lose in total to pruned keys. `None` prunes nothing. Attention prunes
            where the default `attn_implementation`, `"fox"`, runs on GPU kernels (without gradients only passes that
            are long enough to gain by it) and under context parallelism; the evicting cache does on any device.
        acp_rule (`str`, defaults to `"tight"`): The pruning rule: `"tight"`; `"paper"`, the rule of the paper, whose
            bound of the logits is taken from the weights of QK-norm where there are some; or `"measured"`, which drops
            more by computing weights, in training (without gradients attention then goes by `"tight"`, since a forward
            pass alone is slower for being measured; not with context parallelism).
        forget_aux_loss_coef (`float`, defaults to 0.0): Forget-gate regularisation: in training, the weight in nats of
            an auxiliary loss of a language model that rewards heads for forgetting. It is a smooth stand-in for the
            computed-tile fraction that the gates leave: the mean over heads of `30 / (30 + n)`, where gates decay by
            `n` nats over the row; a packed row counts as one sequence. Other task heads ignore it.
        loss_chunk_size (`int`, *optional*): In training, compute a language model's loss in chunks of so many tokens
            and recompute their logits in backward, instead of storing the logits of all tokens; the output then has no
            logits. `None`, the default, stores them.
        free_dead_cache (`bool`, defaults to `False`): Let `generate` use the evicting cache, `FoxPagedCache`, which
            frees the memory of keys that no later query can give more than `acp_eps` of its weight, on any device.
            Assisted decoding, which crops many tokens, does not use it. `generate` takes the same name as a keyword.
        decoding_graphs (`bool`, defaults to `True`): Let `generate` capture its steps in CUDA graphs, where the default
            `attn_implementation` runs on GPU kernels: it then launches a step as a whole, without torch.compile.
        grafted_from (`str`, *optional*): The `model_type` of the Transformer whose weights the model started from, by
            `foxlm graft`. Nothing computed depends on it; the model card says it.

    Raises:
        `ValueError` for a wrong type or value: the message names the field, what came and what is accepted. Sizes have
        upper limits, such as 4,096 layers, far beyond any model.
        An unknown field is an error if its name resembles that of a known one, else a warning; in a file, which may be
        of a newer version, always a warning.

    ```python
    >>> from foxlm import FoxConfig, FoxForCausalLM

    >>> config = FoxConfig.preset("pro-125m")
    >>> model = FoxForCausalLM(config)
    ```
    """

    model_type = "fox"
    # Names of other models for fields of this one, which may be read and assigned by them.
    attribute_map: ClassVar[dict[str, str]] = {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "num_layers": "num_hidden_layers",
        "norm_eps": "rms_norm_eps",
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # One RoPE for all layers: transformers' tools would otherwise look for one per entry of `layer_types`.
    _rope_type_labels: ClassVar[None] = None

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int | None = None
    mlp_ratio: float | int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 16384
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    nope_layers: list[int] | None = None
    norm_position: Literal["pre", "post"] = "pre"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    forget_gate: Literal["full", "bias_only", "fixed", "none"] = "full"
    forget_gate_heads: Literal["query", "key_value"] = "query"
    decay_time_min: float | int = 2.0
    decay_time_max: float | int = 2048.0
    attention_sink: Literal["none", "learned"] = "none"
    sink_token_id: int | None = None
    qk_norm: Literal["per_head", "shared", "all_heads", "none"] = "per_head"
    qk_norm_eps: float | int | None = None
    use_key_shift: bool = True
    use_value_shift: bool = True
    use_output_gate: bool = True
    output_gate_act: Literal["sigmoid", "silu"] = "sigmoid"
    use_output_norm: bool = True
    acp_eps: float | int | None = DEFAULT_EPS
    acp_rule: Literal["paper", "tight", "measured"] = "tight"
    forget_aux_loss_coef: float | int = 0.0
    loss_chunk_size: int | None = None
    free_dead_cache: bool = False
    decoding_graphs: bool = True
    grafted_from: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def preset(cls, name: str, **overrides) -> "FoxConfig":
        """A model of the papers, e.g. `"pro-760m"`: `llama` or `pro` with `125m`, `360m` or `760m`.

        `foxlm convert` writes these models in the authors' format, `llama` ones also in flash-linear-attention's.

        Args:
            name: block and size.
            overrides: any other field of the configuration.
        """
        names = [f"{block}-{size}" for block in ("llama", "pro") for size in _SIZES]
        if name not in names:
            raise ValueError(f"name must be one of {names}, got {name!r}")
        block, size = name.split("-")
        hidden_size, layers, heads = _SIZES[size]
        fields = {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            **(_PRO_PARTS if block == "pro" else _LLAMA_PARTS),
        }
        return cls(**(fields | overrides))

    def __post_init__(self, **kwargs):
        self._refuse_foreign(kwargs)
        self._check_inherited(kwargs)
        # Before the following makes lists of these sizes.
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
                    f"got {self.hidden_size} and {self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._derive_intermediate_size()
        # Before super: transformers 5.17 extends it there for tied embeddings. It is never saved.
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)

    def _derive_intermediate_size(self) -> None:
        ratio = self.mlp_ratio
        self._require("mlp_ratio", ratio is None or 0 < ratio <= 1e4, "a positive number up to 1e4")
        if self.intermediate_size is None and ratio is None:
            ratio = 3.5 if self.use_output_gate else 4.0
        if ratio is None:
            return
        derived = 256 * -(-int(self.hidden_size * ratio * 2 / 3) // 256)
        if self.intermediate_size not in (None, derived):
            raise ValueError(
                f"mlp_ratio {ratio} makes intermediate_size {derived}, "
                f"but intermediate_size is {self.intermediate_size}: give one of them"
            )
        # Only the size is kept, so that a saved configuration can be loaded with another one.
        self.intermediate_size, self.mlp_ratio = derived, None

    @property
    def layer_types(self) -> list[str]:
        """What each layer caches, for transformers' cache classes; all layers are alike and it is not saved."""
        # Here, so that a configuration can be read without loading caches.
        from .cache.layer_types import register_layer_type

        return [register_layer_type(self)] * self.num_hidden_layers

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads and head size."""
        assert self.num_key_value_heads is not None and self.head_dim is not None, "set in __post_init__"
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def _tensor_parallel_plan(self) -> dict[str, str]:
        return {
            **{f"layers.*.self_attn.{name}": style for name, style in self._attention_plan().items()},
            "layers.*.mlp.gate_proj": "colwise",
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": SUMMED_OVER_RANKS,
        }

    def _attention_plan(self) -> dict[str, str]:
        """Tensor-parallel styles of the parts of attention that there are: each head is on one rank."""
        if self.qk_norm == "all_heads":
            # Its norms need all heads of a token: the projections are sharded, and each rank computes all else in full.
            gathered = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")
            return gathered | {"o_proj": "rowwise_split_input"}
        plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": SUMMED_OVER_RANKS}
        if self.qk_norm == "per_head":
            plan |= {"q_norm.weight": "colwise", "k_norm.weight": "colwise"}
        elif self.qk_norm == "shared":
            # Each rank sees the gradient of its own heads only.
            plan |= dict.fromkeys(("q_norm", "k_norm"), SHARED_BY_HEADS)
        if self.attention_sink != "none":
            plan |= {"sink.key": "colwise", "sink.value": "colwise"}
        if self.use_key_shift:
            plan["key_shift.proj"] = "colwise"
        if self.use_value_shift:
            plan["value_shift.proj"] = "colwise"
        if self.use_output_norm:
            plan["output_norm.weight"] = "colwise"
        if self.use_output_gate:
            plan["output_gate"] = "colwise"
        return (
            plan
            | {
                "full": {"forget_gate": "colwise"},
                "bias_only": {"forget_gate.bias": "colwise"},
                "fixed": {"forget_gate.bias": "colwise"},
                "none": {},
            }[self.forget_gate]
        )

    def has_rope(self, layer_idx: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        return self.rope_parameters is not None and layer_idx not in (self.nope_layers or ())

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers, with the model's code beside ``config.json``. Saving a model comes by here."""
        super().save_pretrained(save_directory, **kwargs)
        # A class derived from this one has code that we do not know.
        if type(self) is FoxConfig:
            export_code(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def to_dict(self) -> dict:
        """As in transformers, without ``auto_map`` entries of our own code."""
        # PEFT calls this before it looks up default targets, and may have been imported after the model was made.
        extend_peft_defaults()
        fields = super().to_dict()
        # Where a folder has our code: not part of the configuration, and written anew with the code.
        others = {name: where for name, where in fields.pop("auto_map", {}).items() if AUTO_MAP.get(name) != where}
        return fields | {"auto_map": others} if others else fields

    @property
    def num_forget_gates(self) -> int:
        """Gates per token and layer; without gates one, shared by all heads, that never forgets."""
        if self.forget_gate == "none":
            return 1
        return self.num_attention_heads if self.forget_gate_heads == "query" else cast(int, self.num_key_value_heads)

    @property
    def gates_learn(self) -> bool:
        """Whether there are gates, and training changes them."""
        return self.forget_gate in ("full", "bias_only")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, but that values in ``kwargs`` are checked, and fields derived from them, too.

        A field that the class does not have is said in a warning, since a file may be of a newer version; in
        ``kwargs``, or where another library's name of a field of ours is meant, it is an error.
        """
        unknown = unknown_fields(config_dict, cls, cls.__dataclass_fields__)
        later = {name: config_dict[name] for name in unknown if not is_foreign(name)}
        for name in later:
            warn_unknown(name, near_miss(name, cls.__dataclass_fields__), cls)
        given = {name: value for name, value in config_dict.items() if name not in later}
        for name in list(kwargs):
            field = cls.attribute_map.get(name, name)
            if field in cls.__dataclass_fields__ and field != "dtype":
                given[field] = kwargs.pop(name)
            elif unknown_fields([name], cls, ()) and (hint := near_miss(name, cls.__dataclass_fields__)):
                raise ValueError(f"{name} is not a field of {cls.__name__}: {hint}")
        found = super().from_dict(given, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        for name, value in later.items():
            setattr(config, name, value)
        return found

    def _refuse_foreign(self, kwargs: dict) -> None:
        """transformers keeps any unknown argument as an attribute; one that means a field of ours would be ignored."""
        drop_empty_foreign(kwargs)
        for name in unknown_fields(kwargs, type(self), self.__dataclass_fields__):
            hint = near_miss(name, self.__dataclass_fields__)
            if hint is not None:
                raise ValueError(f"{name} is not a field of {type(self).__name__}: {hint}")
            warn_unknown(name, None, type(self))

    def _check_inherited(self, kwargs: dict) -> None:
        """Fields of transformers' own that a model is built by, which its class takes as they come."""
        for name, value in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            if value is not None and not is_dtype(value):
                raise ValueError(f"{name} must be a floating-point type of torch, such as bfloat16, got {value!r}")
        labels, count = self.id2label, kwargs.get("num_labels", 2)
        self._require("id2label", labels is None or is_labels(labels), "a dict from whole numbers to names")
        if type(count) is not int or not 0 < count <= LARGEST_LABELS:
            raise ValueError(f"num_labels must be a whole number from 1 to {LARGEST_LABELS:,}, got {count!r}")
        named = self.architectures
        named_well = named is None or (isinstance(named, list) and all(isinstance(name, str) for name in named))
        self._require("architectures", named_well, "a list of names of classes")

    def _check_sizes(self) -> None:
        for field, largest in LARGEST.items():
            value = getattr(self, field)
            # Before `@strict` has seen it, it may be anything.
            if isinstance(value, int):
                self._require(field, 0 < value <= largest, f"a positive integer up to {largest:,}")

    def convert_rope_params_to_dict(self, **kwargs):
        # transformers turns None into a default RoPE; here None means no RoPE.
        if self.rope_parameters is None and not kwargs.get("rope_scaling") and "rope_theta" not in kwargs:
            if kwargs.get("partial_rotary_factor") is not None:
                raise ValueError("partial_rotary_factor has no effect without rope_parameters")
            kwargs.pop("rope_scaling", None)
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

    def validate_rope(self) -> None:
        if self.rope_parameters is None:
            return
        rope_type = self.rope_parameters.get("rope_type", "default")
        accepted = ["default", *ROPE_INIT_FUNCTIONS]
        if rope_type not in accepted:
            raise ValueError(f"rope_parameters must have a rope_type in {accepted}, got {rope_type!r}")
        for name in ("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"):
            value = self.rope_parameters.get(name, 1)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"rope_parameters must have a positive number as {name}, got {value!r}")
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if not 0 < factor <= 1:
            raise ValueError(f"rope_parameters must have a partial_rotary_factor in (0, 1], got {factor!r}")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"{error.args[0]}, got {self.rope_parameters}") from error

    def validate_layer_type(self) -> None:
        """`layer_types` is derived here: nothing to check."""

    def validate_architecture(self) -> None:
        """Part of `@strict`'s validation: sizes that contradict each other."""
        self._check_sizes()
        self._require(
            "num_key_value_heads",
            self.num_attention_heads % self.heads[1] == 0,
            f"a divisor of num_attention_heads ({self.num_attention_heads})",
        )
        for field in ("rms_norm_eps", "qk_norm_eps", "initializer_range"):
            value = getattr(self, field)
            self._require(field, value is None or 0 < value < math.inf, "a positive number")
        if self.pad_token_id is not None:
            accepted = f"None or in [0, vocab_size) = [0, {self.vocab_size})"
            self._require("pad_token_id", 0 <= self.pad_token_id < self.vocab_size, accepted)
        if self.sink_token_id is not None:
            accepted = f"None or in [0, vocab_size) = [0, {self.vocab_size})"
            self._require("sink_token_id", 0 <= self.sink_token_id < self.vocab_size, accepted)
            self._require("sink_token_id", self.attention_sink != "none", "None without an attention_sink")
        self._require("hidden_act", self.hidden_act in ACT2FN, f"one of {sorted(ACT2FN)}")
        for field in ("attention_dropout", "classifier_dropout"):
            self._require(field, 0 <= getattr(self, field) < 1, "a number in [0, 1)")
        self._require(
            "forget_aux_loss_coef", 0 <= self.forget_aux_loss_coef < math.inf, "a number that is not negative"
        )
        if self.forget_aux_loss_coef and not self.gates_learn:
            raise ValueError(
                f"forget_aux_loss_coef has no effect with forget_gate {self.forget_gate!r}: no gate learns"
            )
        chunk = self.loss_chunk_size
        self._require(
            "loss_chunk_size", chunk is None or 0 < chunk <= 2**31, "None or a positive number of tokens up to 2**31"
        )
        accepted = "a number in (0, 1), or None, which turns pruning off"
        self._require("acp_eps", self.acp_eps is None or 0 < self.acp_eps < 1, accepted)
        # An upper bound beyond any sequence, below which exp(1 / T) - 1 is exact enough in float32 arithmetic.
        self._require("decay_time_min", 0 < self.decay_time_min <= 1e9, "a number of tokens in (0, 1e9]")
        self._require(
            "decay_time_max",
            self.decay_time_min <= self.decay_time_max <= 1e9,
            f"a number of tokens in [decay_time_min, 1e9] = [{self.decay_time_min}, 1e9]",
        )
        if self.rope_parameters is not None:
            self._require("head_dim", self.heads[2] % 2 == 0, "an even number with rope_parameters")
        if self.nope_layers is not None:
            layers, total = self.nope_layers, self.num_hidden_layers
            ordered = all(a < b for a, b in zip([-1, *layers], [*layers, total], strict=True))
            self._require("nope_layers", ordered, f"None or increasing indices of the {total} layers")
            self._require("nope_layers", self.rope_parameters is not None, "None without rope_parameters")

    def _require(self, field: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{field} must be {accepted}, got {getattr(self, field)!r}")


__all__ = ["FoxConfig"]
