"""What vLLM asks of a kind of attention: the layout of its cache, and what each step tells every layer."""

import itertools
import math
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ...kernels.tiles import PRUNED_KEYS
from .blocks_read import BlocksRead
from .pages import Chunk, Step, make_step
from .pages_on_gpu import GpuStep, Prompts


class FoxStepBuilder(AttentionMetadataBuilder[Step | GpuStep]):
    """Makes the step that all layers read in one forward pass."""

    # Of one token for each request, on a GPU: see `GpuStep`.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Requests with one token are to come first.
        self._init_reorder_batch_threshold(1)
        # Nothing is pruned on a CPU.
        self._read = None if device.type == "cpu" else BlocksRead(_block_bytes(vllm_config.model_config), device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step | GpuStep:
        batch, size = common_attn_metadata, self.kv_cache_spec.block_size
        on_cpu = self.device.type == "cpu"
        rows, known = batch.query_start_loc_cpu.tolist(), batch.seq_lens_cpu_upper_bound
        # Exact, as there is no speculation.
        assert on_cpu or known is not None, "lengths are on the host, so that nothing waits for the device"
        lengths = (batch.seq_lens if known is None else known).tolist()
        counts = [stop - first for first, stop in itertools.pairwise(rows)]

        def chunk(i: int) -> Chunk:
            pages = batch.block_table_tensor[i, : -(-lengths[i] // size)]
            return Chunk(slice(rows[i], rows[i + 1]), lengths[i] - counts[i], pages.long() if on_cpu else pages)

        # Requests that only fill a batch up have no tokens.
        if on_cpu:
            return make_step([chunk(i) for i, count in enumerate(counts) if count], size)
        single = next((i for i, count in enumerate(counts) if count > 1), len(counts))
        chunks, first = [], single
        prompts: list[Prompts] = []
        for i in range(single, len(counts) + 1):
            if i < len(counts) and lengths[i] == counts[i]:
                continue
            if first < i:
                pairs = sum(count * count for count in counts[first:i])
                prompts.append(Prompts(slice(first, i), slice(rows[first], rows[i]), math.isqrt(pairs)))
            if i < len(counts):
                chunks.append(chunk(i))
            first = i + 1
        assert self._read is not None
        self._read.look()
        tables = batch.query_start_loc, batch.seq_lens, batch.block_table_tensor
        return GpuStep(*tables, max(counts, default=1), single, chunks, prompts, self._read.counts)


def _block_bytes(model_config: Any) -> int:
    """Of the keys, values and gate sums of 64 tokens of a key/value head."""
    config = model_config.hf_config
    _, kv_heads, head_dim = config.heads
    gates = config.num_forget_gates / kv_heads
    return round(PRUNED_KEYS * (2 * head_dim * model_config.dtype.itemsize + gates * torch.float64.itemsize))


class FoxAttentionBackend(AttentionBackend):
    """Attention of FoX layers: they call it themselves and keep their own cache."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # Of kernels, which vLLM then chooses; see `ServedAttention.get_kv_cache_spec`. PyTorch takes any.
        return [MultipleOf(1 if current_platform.is_cpu() else PRUNED_KEYS)]

    @staticmethod
    def get_name() -> str:
        return "FOX"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("FoX layers call their attention themselves")

    @staticmethod
    def get_builder_cls() -> type[FoxStepBuilder]:
        return FoxStepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Pages are contiguous, and those of one layer beside each other.
        return (KVCacheLayout.LBHNC,)
