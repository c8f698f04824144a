"""Graft forget gates onto a pretrained Transformer, which then learns to forget by finetuning.

    from foxlm.conversion.graft import graft

    model = graft("path/to/a/llama")

The result is a FoX model with the weights of the base, mapped one to one by name, plus forget gates that do not depend
on the data yet: each head starts with a decay time of its own. With infinite decay times (`decay_times=math.inf`) the
model computes what its base does. `calibration.calibrate` measures on text which decay times cost least, and gives the
graft attention sinks. Supported bases are listed in `formats.llama_family`.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from foxlm.conversion.checkpoint_io import check_sizes, headers_to_load
from foxlm.conversion.formats.checkpoint_format import invalid_config_as_value_error
from foxlm.conversion.formats.llama_family import base_config, base_of, check_model_type
from foxlm.conversion.links import check_links
from foxlm.conversion.new_folder import TEXT_FILES, check_new, copy_text_files, new_folder
from foxlm.conversion.weight_map import Plan, Rename, distinct_weights, make_model, plan_to_fox
from foxlm.kernels.argument_types import typed
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.layers.forget_gate import bias_for_times, log_spaced_times
from foxlm.modeling.model_files import read_config, read_fields, read_model
from foxlm.modeling.modeling_fox import FoxForCausalLM

if TYPE_CHECKING:
    from foxlm.conversion.calibrated_graft import CalibrationText
    from foxlm.conversion.calibration import Calibration

DecayTimes = float | Sequence[float] | Sequence[Sequence[float]] | Tensor

_GATES = ("full", "bias_only", "fixed", "none")
_LOCAL = 64.0
_BEYOND_CONTEXT = 16.0
# New weights besides the biases of the gates.
_NEW_ZEROS = ("forget_gate.weight", "output_gate.weight")
_SINK = "model.layers.{}.self_attn.sink."
_FETCHED = ["config.json", "model*.safetensors*", *TEXT_FILES]


def graft(
    model: PreTrainedModel | str | Path,
    *,
    decay_times: DecayTimes | None = None,
    calibration: "Calibration | None" = None,
    forget_gate: str = "full",
    forget_gate_heads: str = "query",
    output_gate: bool = False,
    keep_rope: bool = True,
    rope_factor: float | None = None,
) -> FoxForCausalLM:
    """Add forget gates to a pretrained Transformer; returns a copy with the base's dtype and device.

    Token shift, output norm and (where the base has none) QK-norm change the function however they are initialised, so
    they are not offered. On a GPU pruning drops attention weights up to `acp_eps`: set `model.config.acp_eps` to None
    to reproduce the base's outputs there.

    Args:
        model: a language model of transformers (llama, mistral, qwen2, qwen3, smollm3, olmo2), its folder, or its name
            on the Hugging Face Hub.
        decay_times: initial decay time `T` of each gate in tokens, `log f = -1 / T` for every token. A number for all;
            `(min, max)`, log-spaced over the heads of each layer; or a table `[layers, gates]`. None means
            `(64, 16 * max_position_embeddings)`, from local to longer than the context. An infinite decay time leaves
            a head unchanged, and its gradient is zero, so it stays infinite.
        calibration: of this model, by `calibration.calibrate` for the same ``forget_gate_heads``: the graft gets its
            attention sinks, which stand for the separator where a text begins with it, the pruning rule ``measured``,
            and its decay times unless ``decay_times`` is given.
        forget_gate: as in `FoxConfig`: `"full"`, whose weights start from zero, `"bias_only"` or `"fixed"`; or
            `"none"`, the base model as a FoX model, to compare finetuning with and without gates.
        forget_gate_heads: `"query"` or `"key_value"`, as in `FoxConfig`.
        output_gate: whether to add an output gate. It starts at 1/2 everywhere; `o_proj` is doubled to compensate.
        keep_rope: whether to keep rotary embeddings. Without them the function changes even if no gate forgets.
        rope_factor: times the base's context that the graft is for: rotary embeddings are stretched to that by YaRN
            (arXiv 2309.00071, section 3.4, without its temperature). A sink is as far away as a text is long, and at
            distances that the base was not trained at its weight is lost; where heads forget, only that is new. The
            function changes a little within the context too. For ``calibration`` give the same to the base.

    Raises:
        ValueError: the model has a part that a FoX model cannot represent, or an argument is not as above; the message
            names the field, weight or argument.
        OSError: a file of the model cannot be read.
    """
    # By what it has: to import its class takes what it takes to evaluate.
    if calibration is not None and not hasattr(calibration, "decay_times"):
        raise ValueError(f"calibration must be what calibrate found, a Calibration, or None, got {calibration!r}")
    if forget_gate not in _GATES:
        raise ValueError(f"forget_gate must be one of {_GATES}, got {forget_gate!r}")
    for name, given in (("decay_times", decay_times), ("calibration", calibration)):
        if forget_gate == "none" and given is not None:
            raise ValueError(f"{name} has no effect with forget_gate 'none'")
    if isinstance(model, str | Path):
        model = _folder_of(model)
    with invalid_config_as_value_error():
        source = _config_of(model)
        config = base_config(
            source,
            keep_rope=keep_rope,
            rope_factor=rope_factor,
            forget_gate=forget_gate,
            forget_gate_heads=forget_gate_heads,
            use_output_gate=output_gate,
        )
    config.grafted_from = source.model_type
    sinks: dict[str, Tensor] = {}
    if calibration is not None:
        decay_times = calibration.decay_times if decay_times is None else decay_times
        sinks = _set_sinks(config, calibration)
    biases = {} if forget_gate == "none" else _set_decay_times(config, decay_times)

    with invalid_config_as_value_error():
        plan = _plan(config, base_of(source).zeros + _NEW_ZEROS)
    if isinstance(model, PreTrainedModel):
        weights = {name: weight.clone() for name, weight in _plain_weights(model).items()}
    else:
        model = _load(model, plan)
        weights = _plain_weights(model)
    if output_gate:
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.o_proj.weight"
            weights[name] = 2 * weights[name]
    gate_dtype = torch.promote_types(model.dtype, torch.float32)
    weights |= {name: bias.to(gate_dtype) for name, bias in biases.items()}
    weights |= {name: sink.to(model.device, model.dtype) for name, sink in sinks.items()}
    plan.check(weights, weights.__getitem__)
    grafted = make_model(plan, config, weights.__getitem__, model.dtype).to(model.device)
    grafted.generation_config = copy.deepcopy(model.generation_config)
    return grafted


@typed
def graft_to_folder(
    source: str | Path, out: str | Path, *, calibrate: "CalibrationText | None" = None, **options: Any
) -> None:
    """Write `graft` of ``source``, and its tokenizer, to the new folder ``out``, atomically.

    Args:
        source: folder, or name on the Hugging Face Hub.
        out: folder to make.
        calibrate: text to calibrate on; what was found is then in ``out`` too.
        options: of `graft`.

    Raises:
        ValueError: ``out`` exists already or lies in ``source``; or as `graft`.
        OSError: as `graft`.
    """
    if calibrate is not None and not hasattr(calibrate, "skip"):
        raise ValueError(f"calibrate must be a CalibrationText or None, got {calibrate!r}")
    # Before anything is fetched or read; `new_folder` checks again.
    check_new(Path(out), Path(source))
    source = _folder_of(source)
    report = None
    if calibrate is None:
        model = graft(source, **options)
    else:
        # Imported when it is used: evaluation imports much.
        from foxlm.conversion.calibrated_graft import calibrated_graft, write_report

        model, report = calibrated_graft(source, calibrate, **options)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        copy_text_files(source, folder)
        if report is not None:
            write_report(report, folder)


def decay_time_table(decay_times: DecayTimes | None, config: FoxConfig) -> Tensor:
    """``[layers, gates]`` float64 decay times from the argument of `graft`; raises a `ValueError` if it is invalid."""
    shape = (config.num_hidden_layers, config.num_forget_gates)
    if decay_times is None:
        decay_times = (_LOCAL, _BEYOND_CONTEXT * config.max_position_embeddings)
    accepted = f"a number of tokens, (min, max), or a table of shape {list(shape)}"
    try:
        times = torch.as_tensor(decay_times, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"decay_times must be {accepted}, got {decay_times!r}: {error}") from error
    if times.shape not in ((), (2,), shape):
        raise ValueError(f"decay_times must be {accepted}, got shape {list(times.shape)}")
    # Also false for NaN.
    if not (times > 0).all():
        raise ValueError(f"decay_times must be positive, got {times[~(times > 0)][0].item()}")
    if times.shape == (2,):
        low, high = times.tolist()
        if not low <= high < math.inf:
            raise ValueError(f"decay_times must be min <= max, both finite, got min {low} and max {high}")
        times = log_spaced_times(low, high, shape[1])
    return times.expand(shape)


def _set_decay_times(config: FoxConfig, decay_times: DecayTimes | None) -> dict[str, Tensor]:
    """Record the range of decay times in ``config`` and return the float64 gate biases that give them, by name."""
    times = decay_time_table(decay_times, config)
    # Read where gates are initialised anew, and by readers of the configuration.
    config.decay_time_min, config.decay_time_max = (_recorded(time) for time in (times.min(), times.max()))
    return {
        f"model.layers.{layer}.self_attn.forget_gate.bias": bias for layer, bias in enumerate(bias_for_times(times))
    }


def _set_sinks(config: FoxConfig, calibration: "Calibration") -> dict[str, Tensor]:
    """Give ``config`` attention sinks and the rule ``measured``; returns the sinks' weights, by name."""
    _, kv_heads, head_dim = config.heads
    shape = (config.num_hidden_layers, kv_heads, head_dim)
    if calibration.sink_keys.shape != shape:
        raise ValueError(
            f"calibration must be of this model, with sinks of shape {list(shape)}, "
            f"got {list(calibration.sink_keys.shape)}"
        )
    config.attention_sink, config.sink_token_id = "learned", calibration.separator
    # By which the share to skip was counted; without QK-norm a bound of logits shows little of it.
    config.acp_rule = "measured"
    return {
        _SINK.format(layer) + name: sink
        for name, sinks in (("key", calibration.sink_keys), ("value", calibration.sink_values))
        for layer, sink in enumerate(sinks)
    }


def _plan(config: FoxConfig, zeros: tuple[str, ...]) -> Plan:
    """The plan that maps weights one to one by name; those whose names end with one of ``zeros`` are zero."""
    with torch.device("meta"):
        model = FoxForCausalLM(config)
    renames = [Rename(None if name.endswith(zeros) else name, (name,)) for name in distinct_weights(model)]
    return plan_to_fox(renames, model)


def _folder_of(source: str | Path) -> Path:
    """The folder itself, or the local snapshot of a model on the Hub, downloaded if needed."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=_FETCHED))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model must be a folder, or the name of a model on the Hugging Face Hub, got {str(source)!r}: "
                + str(error).split("\n")[0]
            ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder must hold a config.json, got {folder}")
    check_links(folder)
    fields = read_fields(folder)
    check_model_type(fields.get("model_type"))
    if (headers := headers_to_load(folder)) is not None:
        check_sizes(fields, headers)
    return folder


def _recorded(time: Tensor) -> float:
    """A decay time rounded to nine digits and limited to what `FoxConfig` accepts."""
    return float(f"{min(time.item(), 1e9):.9g}")


def _config_of(model: PreTrainedModel | Path) -> PreTrainedConfig:
    if isinstance(model, Path):
        return read_config(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a model of transformers, a folder or a name on the Hub, got {type(model).__name__}; "
            "adapters are merged first"
        )
    base_of(model.config)
    expected = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), PreTrainedModel)
    # A subclass may compute anything.
    if type(model) is not expected:
        raise ValueError(f"model must be a {expected.__name__}, got {type(model).__name__}")
    return model.config


def _load(source: Path, plan: Plan) -> PreTrainedModel:
    """The model in a folder; raises a `ValueError` if its files do not hold all that ``plan`` reads."""
    headers = headers_to_load(source) or {}
    held, needed = sum(x.numel() for x in headers.values()), sum(shape.numel() for shape in plan.reads.values())
    # transformers would initialise missing weights, whatever their size. Gates are small and always missing.
    if headers and needed > 2 * held:
        raise ValueError(
            f"config.json describes a model of {needed:,} parameters, but the files of {source} hold {held:,}"
        )
    # transformers initialises missing or misshapen weights and ignores unexpected ones; they are refused here.
    model, found = read_model(source, dtype="auto", ignore_mismatched_sizes=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[kind])):
            raise ValueError(f"model must be complete, got {source} with {kind} {', '.join(names[:5])}")
    return model


def _plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    weights = model.state_dict()
    for name, weight in weights.items():
        if type(weight) is not Tensor or weight.is_meta or weight.dtype != model.dtype:
            raise ValueError(
                f"weights must be in memory, whole, and all {model.dtype}, got {name} as {type(weight).__name__} of "
                f"{weight.dtype} on {weight.device}"
            )
    return weights
