"""What FoX cannot do on vLLM, refused by name before anything is computed."""

import warnings
from typing import Any

import torch

from ...kernels.backends import PYTORCH, backend_of
from ...kernels.tiles import LARGEST_DECODED_ROWS, LARGEST_HEAD_DIM
from ..configuration_fox import DEFAULT_IMPLEMENTATION, FoxConfig
from ..parallel.tensor_parallel import check_tensor_parallel

# Of `vllm` in setup.cfg: the plugin uses parts of vLLM that change without notice.
TESTED = "0.32"
# Types of RoPE whose angles depend on how long a sequence has become: requests of one step are of many lengths.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


def check_limits(config: FoxConfig, vllm_config: Any) -> None:
    """Refuse what a model or an engine is configured for and FoX does not support on vLLM.

    Args:
        config: of the model.
        vllm_config: of the engine.

    Raises:
        ValueError: the message names the option, what it is, and what is accepted.
    """
    import vllm

    if not vllm.__version__.startswith(f"{TESTED}."):
        warnings.warn(f"foxlm was tested with vLLM {TESTED}, and this is {vllm.__version__}", stacklevel=2)
    if not isinstance(config, FoxConfig):
        raise ValueError(f"the model's configuration must be foxlm's FoxConfig, got {type(config).__module__}")
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if rope_type in _ROPE_BY_LENGTH:
        raise ValueError(
            f"rope_parameters must have a rope_type whose angles do not depend on the length of a sequence to be "
            f"served by vLLM, got {rope_type!r}"
        )
    if config.sink_token_id is not None and vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            f"enable_prompt_embeds must be False for a model with a sink_token_id, here {config.sink_token_id}: where "
            "vLLM takes embeddings it does not say which tokens they are of"
        )
    device_type = vllm_config.device_config.device_type
    _check_device(config, device_type)
    parallel = vllm_config.parallel_config
    _check_ranks(config, parallel.tensor_parallel_size, vllm_config.lora_config is not None)
    if device_type == "cpu" and vllm_config.lora_config is not None:
        warnings.warn(
            f"vLLM {TESTED} on a CPU computes a request without an adapter by what is in its last slot for adapters, "
            "when another request of the step has one: max_loras must be greater than the number of adapters, got "
            f"{vllm_config.lora_config.max_loras}",
            stacklevel=2,
        )
    cache = vllm_config.cache_config
    for name, value, accepted in (
        ("runner", vllm_config.model_config.runner_type, "generate"),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, 1),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1),
        ("enable_dbo or ubatch_size > 1", parallel.use_ubatching, False),
        ("kv_cache_dtype", cache.cache_dtype, "auto"),
        ("quantization", vllm_config.model_config.quantization, None),
        ("speculative_config", vllm_config.speculative_config, None),
        ("kv_transfer_config", vllm_config.kv_transfer_config, None),
        ("cpu_offload_gb", vllm_config.offload_config.uva.cpu_offload_gb, 0),
        ("offload_group_size", vllm_config.offload_config.prefetch.offload_group_size, 0),
    ):
        if value != accepted:
            raise ValueError(f"{name} must be {accepted!r} for a FoX model on vLLM, got {value!r}")


def _check_ranks(config: FoxConfig, ranks: int, has_adapters: bool) -> None:
    """Refuse tensor parallelism of what is not of whole heads."""
    if ranks == 1:
        return
    if has_adapters:
        raise ValueError(
            f"enable_lora must be False with tensor_parallel_size {ranks} for a FoX model on vLLM, got True"
        )
    if config.qk_norm == "all_heads":
        raise ValueError(
            f"tensor_parallel_size must be 1 on vLLM for a model whose qk_norm is 'all_heads', got {ranks}: its norms "
            "need all heads of a token"
        )
    check_tensor_parallel(config, ranks, "tensor_parallel_size")


def _check_device(config: FoxConfig, device_type: str) -> None:
    """Refuse a device that is neither a CPU nor a GPU that kernels run on, and what kernels do not do there."""
    if device_type == "cpu":
        return
    if device_type != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda' for a FoX model on vLLM, got {device_type!r}")
    heads, kv_heads, head_dim = config.heads
    probe = torch.empty(1, 1, heads, head_dim, dtype=torch.bfloat16, device=device_type)
    backend = backend_of(probe)
    if backend is PYTORCH or not backend.can_decode(probe, kv_heads):
        raise ValueError(
            "a FoX model on vLLM needs a GPU of compute capability 8.0 or newer with Triton, heads of at most "
            f"{LARGEST_HEAD_DIM} and at most {LARGEST_DECODED_ROWS} query heads for each key/value head; got "
            f"{torch.cuda.get_device_name()}, heads of {head_dim}, {heads} over {kv_heads}"
        )
    if config._attn_implementation not in (None, DEFAULT_IMPLEMENTATION):
        raise ValueError(
            f"attn_implementation must be {DEFAULT_IMPLEMENTATION!r} for a FoX model by vLLM on a GPU, got "
            f"{config._attn_implementation!r}"
        )
