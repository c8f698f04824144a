"""What vLLM asks of a kind of attention: the layout of its cache, and what each step tells every layer."""

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
from .pages import Chunk, Step, make_step
from .pages_on_gpu import GpuStep


class FoxStepBuilder(AttentionMetadataBuilder[Step | GpuStep]):
    """Makes the step that all layers read in one forward pass."""

    # Of one token for each request, on a GPU: see `GpuStep`.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Requests with one token are to come first.
        self._init_reorder_batch_threshold(1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step | GpuStep:
        batch, size = common_attn_metadata, self.kv_cache_spec.block_size
        rows, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens_cpu_upper_bound
        # Exact, as there is no speculation.
        lengths = (batch.seq_lens if lengths is None else lengths).tolist()
        on_cpu = self.device.type == "cpu"
        single, chunks = 0, []
        for i, length in enumerate(lengths):
            first, stop = rows[i], rows[i + 1]
            if not on_cpu and single == i and stop - first <= 1:
                single += 1
            # Requests that only fill a batch up have no tokens.
            elif stop > first:
                pages = batch.block_table_tensor[i, : -(-length // size)]
                chunks.append(Chunk(slice(first, stop), length - (stop - first), pages.long() if on_cpu else pages))
        if on_cpu:
            return make_step(chunks, size)
        longest = max((x.end - x.start for x in chunks), default=1)
        tables = batch.query_start_loc, batch.seq_lens, batch.block_table_tensor
        return GpuStep(*tables, longest, single, chunks)


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
