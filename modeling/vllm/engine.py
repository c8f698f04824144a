"""What vLLM asks of a kind of attention: the layout of its cache, and what each step tells every layer."""

from typing import Any

from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from .pages import Chunk, Step, make_step


class FoxStepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the `Step` that all layers read in one forward pass."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        batch, size = common_attn_metadata, self.kv_cache_spec.block_size
        rows = batch.query_start_loc_cpu.tolist()
        chunks = []
        for i, length in enumerate(batch.seq_lens.tolist()):
            first, stop = rows[i], rows[i + 1]
            # Requests that only fill a batch up have no tokens.
            if stop > first:
                pages = batch.block_table_tensor[i, : -(-length // size)].long()
                chunks.append(Chunk(slice(first, stop), length - (stop - first), pages))
        return make_step(chunks, size)


class FoxAttentionBackend(AttentionBackend):
    """Attention of FoX layers, in PyTorch: the layers call it themselves and keep their own cache."""

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
