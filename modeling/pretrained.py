"""What all FoX models share: initialization, transformers' switches, parallelism, fused projections."""

# First, so that a transformers too old is named before an import of its parts fails.
from .versions import CACHE_NAMES

# isort: split

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .configuration_fox import (
    DEFAULT_IMPLEMENTATION,
    IMPLEMENTATIONS,
    FoxConfig,
)
from .layers.attention import FoxAttention
from .layers.attention_sink import FoxAttentionSink
from .layers.block import FoxDecoderLayer
from .layers.forget_gate import FoxConstantGate, FoxForgetGate, decay_time_bias
from .layers.fused_projections import FusableProjections, fuse_projections
from .parallel.tensor_parallel import check_processes, check_tensor_parallel, local_weights

if TYPE_CHECKING:
    from ..kernels.context_parallel.group import ContextParallel


class FoxPreTrainedModel(PreTrainedModel):
    """Weights, initialization and transformers' switches common to all FoX models."""

    config: FoxConfig
    config_class = FoxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FoxDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": FoxDecoderLayer,
        "attentions": FoxAttention,
        "forget_gate_logits": [OutputRecorder(FoxForgetGate), OutputRecorder(FoxConstantGate)],
    }
    # Whether a head needs more than one token's hidden state.
    _sees_whole_sequences = False
    # A gate's bias sets its decay time, which rounding to bfloat16 would change by percents.
    _keep_in_fp32_modules_strict = ["forget_gate"]
    # What quantizers leave out: they match suffixes of module names, torchao of parameter names. Token-shift
    # projections have one row per head: little memory, and 4-bit matmuls want multiples of 16 or 32.
    _not_quantized = [
        name
        for module in ("forget_gate", "key_shift.proj", "value_shift.proj")
        for name in (module, f"{module}.weight")
    ]

    def post_init(self) -> None:
        super().post_init()
        if getattr(self.config, "quantization_config", None) is not None:
            # Where quantizers look. Other models leave it empty: it means float32 in float16 models.
            self._keep_in_fp32_modules.update(self._not_quantized)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # transformers would keep all that quantizers leave out in float32 in a float16 model.
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name in self._keep_in_fp32_modules_strict}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FoxForgetGate | FoxConstantGate):
            init.copy_(module.bias, decay_time_bias(self.config))
        elif isinstance(module, FoxAttentionSink):
            init.zeros_(module.key)
            init.zeros_(module.value)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in [`~transformers.PreTrainedModel.from_pretrained`], with `fixed` gates frozen as in a new model."""
        loaded = super().from_pretrained(*args, **kwargs)
        # With `output_loading_info` the model comes in a pair. Loading makes every weight trainable.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, FoxConstantGate):
                module.bias.requires_grad_(module.learned)
        return loaded

    def set_context_parallel(self, context: "ContextParallel | None") -> None:
        """Split each sequence over the ranks of a group, which all call the model with the same whole sequences.

        Each rank takes its own part of tokens, labels, mask and positions. Logits and hidden states are those of its
        part (`ContextParallel.shards`). The loss is that of the whole sequence, and its gradients are to be averaged
        over the group, as DDP and FSDP do.

        Args:
            context: the group; None ends it.

        Raises:
            ValueError: ``context`` is not a `ContextParallel`, or the model has a head that needs the whole sequence.
        """
        # By its methods: models without context parallelism do not import it.
        if context is not None and not (hasattr(context, "shards") and hasattr(context, "check_same")):
            raise ValueError(f"context must be a ContextParallel or None, got {type(context).__name__}")
        if context is not None and type(self)._sees_whole_sequences:
            raise ValueError(
                f"context parallelism is for FoxModel and FoxForCausalLM: the head of {type(self).__name__} needs the "
                "whole sequence"
            )
        self.base_model.context_parallel = context

    def fuse_projections(self) -> None:
        """Have calls without gradients of up to 64 tokens compute the projections of one input as one matmul.

        On a GPU, prompts of up to 8,192 tokens too, except in attention layers without token shift of values. For
        decoding loops of your own; `generate` does it by itself, and so does the first call without gradients on a GPU,
        of a model in eval mode that was never in training. Per attention layer and MLP, weights are copied into one
        buffer and become its rows: parameters remain the same objects with the same names and values, no weight is
        held twice, and saving, training and changes of weights in place work as before.

        The contract is that of ``model.to()``: tensors taken from the model before, as by ``state_dict()``, keep their
        values but no longer share memory with it, and CUDA graphs captured before are to be captured again.
        ``model.to()`` and its kin and ``model.train()`` undo it. Where a projection is replaced, adapted or hooked
        afterwards, its layer calls projections one by one; a compiled model does not look, and needs another call of
        this or of `unfuse_projections`. Before weights are moved one by one (accelerate's ``dispatch_model``), call
        `unfuse_projections`, since the buffer would hold their memory until the next call.

        A layer is left as it is where a projection is more than a matmul (LoRA, quantized), has hooks, is on another
        device, is a part of a larger memory or shares its weight; under FSDP; and where its buffer does not fit.

        Example:
            >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2)).eval()
            >>> model.fuse_projections()
            >>> cache = FoxPagedCache(model.config, max_cache_len=4096)
            >>> with torch.no_grad():
            ...     for ids in torch.tensor([[1, 2, 3]]), torch.tensor([[4]]):
            ...         logits = model(ids, cache=cache).logits
        """
        fuse_projections(self)

    def unfuse_projections(self) -> None:
        """Undo `fuse_projections`, and what calls left fused: each weight gets memory of its own again.

        Plain calls no longer fuse by themselves.
        """
        self.base_model.fuses_itself = False
        for module in self.modules():
            if isinstance(module, FusableProjections):
                module.unfuse_projections()

    def local_weights(self) -> AbstractContextManager[None]:
        """A context in which a tensor-parallel model decodes faster, for loops of your own; `generate` enters it.

        Within it, sharded weights (`DTensor`) are this rank's plain tensors, and small sums over ranks go through
        memory that the GPUs of one host share. All ranks must enter together. Do not train, save, move or replace
        weights within it. Other models are left as they are.
        """
        return local_weights(self)

    @classmethod
    def prepare_distribute_model(cls, distributed_config, **kwargs):
        # Called by `from_pretrained` before it joins the other processes.
        if isinstance(distributed_config, dict):
            distributed_config = DistributedConfig.from_dict(distributed_config)
        if distributed_config is not None:
            check_processes(distributed_config)
        return super().prepare_distribute_model(distributed_config, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        # Called by `from_pretrained` before it loads weights.
        if distributed_config is not None and distributed_config.tp_size > 1 and distributed_config.tp_plan != {}:
            check_tensor_parallel(model.config, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        # transformers may strip the prefix, and with it what was asked for.
        if attn_implementation is not None and attn_implementation.startswith("paged|"):
            raise _unsupported_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # Called by transformers, whose default is sdpa, and which would accept functions that ignore the decay.
        if requested_attention is None:
            return DEFAULT_IMPLEMENTATION
        if requested_attention not in IMPLEMENTATIONS:
            raise _unsupported_attention(requested_attention)
        return requested_attention


def _unsupported_attention(name: str) -> ValueError:
    return ValueError(
        f'Specified `attn_implementation="{name}"` is not supported by FoX: it must be one of '
        f"{list(IMPLEMENTATIONS)} or None"
    )


__all__ = ["FoxPreTrainedModel"]
