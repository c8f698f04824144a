"""The attention of a FoX layer over the pages of vLLM's cache."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ...kernels.backends import PYTORCH, backend_of
from ...kernels.decay import Decay
from ...kernels.tiles import PRUNED_KEYS
from ..attention_implementations import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, fox_attention_forward
from ..attention_settings import attention_settings
from ..configuration_fox import FoxConfig
from ..layers.attention import FoxAttention
from ..layers.fused_projections import call_linear
from .engine import FoxAttentionBackend
from .pages import Chunk, PageLayout, Pages, Step
from .pages_on_gpu import GpuPages, GpuStep, Prompts


class ServedAttention(FoxAttention, AttentionLayerBase):
    """`FoxAttention` of the tokens of many requests at once, whose keys and gates are in pages of vLLM's cache.

    To be made while vLLM makes a model: it enters itself where vLLM looks for layers that need a cache.

    Args:
        config: as for `FoxAttention`, with the heads of this rank of tensor parallelism.
        layer_idx: index of the layer.
    """

    def __init__(self, config: FoxConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.settings = attention_settings(config, learns=False)
        self.layer_name = f"model.layers.{layer_idx}.self_attn"
        self.pages: Pages | None = None
        self._kv_cache: Tensor | None = None
        vllm_config = get_current_vllm_config()
        self.cache_dtype = vllm_config.model_config.dtype
        self.longest = vllm_config.model_config.max_model_len
        self.page_class = Pages if vllm_config.device_config.device_type == "cpu" else GpuPages
        vllm_config.compilation_config.static_forward_context[self.layer_name] = self

    def get_attn_backend(self) -> type[FoxAttentionBackend]:
        return FoxAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        size = vllm_config.cache_config.block_size
        if self.page_class is GpuPages and size != PRUNED_KEYS:
            raise ValueError(f"block_size must be {PRUNED_KEYS} for a FoX model on a GPU, got {size}")
        layout = self._page_layout(size)
        return FullAttentionSpec(
            block_size=layout.tokens,
            num_kv_heads=layout.kv_heads,
            head_size=layout.head_dim,
            dtype=torch.int8,
            # Bytes, in an order of our own.
            num_head_slots=1,
            state_content_bytes=layout.bytes_per_token(),
        )

    def _page_layout(self, tokens: int) -> PageLayout:
        _, kv_heads, head_dim = self.config.heads
        return PageLayout(tokens, self.config.num_forget_gates, kv_heads, head_dim, self.shifted, self.cache_dtype)

    @property
    def kv_cache(self) -> Tensor | None:
        """What vLLM binds, and replaces by nothing when it lets go of its memory."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, cache: Tensor) -> None:
        self._kv_cache = cache
        self.pages = self.page_class(cache, self._page_layout(cache.shape[2])) if cache.numel() else None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None,
        step: Step | GpuStep | None,
        stands_for: Tensor | None,
    ) -> tuple[Tensor, None]:
        """
        Args:
            hidden_states: ``[1, T, hidden]``, of the tokens of all requests of the step.
            position_embeddings: cosines and sines ``[1, T, rotated size]``; None without RoPE.
            step: whose tokens these are; None where there is no cache yet.
            stands_for: ``[T]`` bool, tokens that the attention sink stands for where they begin a request, or None.

        Returns:
            ``[1, T, hidden]`` and None.
        """
        fused = self.project(hidden_states)
        q, k, v = self._heads(hidden_states, fused)
        if step is None:
            # vLLM measures the memory of a pass before there is a cache. A chunk of the longest text reads this much.
            self._page_layout(PRUNED_KEYS).read_buffers(self.longest, q.device)
            out = self._normalize_and_gate(torch.zeros_like(q), hidden_states, fused)
            return tensor_model_parallel_all_reduce(self.o_proj(out)), None
        # Of the same device as the step.
        pages: Any = self.pages
        assert pages is not None, "vLLM binds a cache before it runs a step"
        angles = position_embeddings if self.use_rope else None
        q, k, v = self._shift_and_rotate((q, k, v), hidden_states, fused, pages, step, angles)
        log_f = self.log_forget_gates(hidden_states)
        c, kv_start = pages.append(k, v, log_f, step, stands_for)
        if step.single == q.shape[1]:
            out = self._attend_single(pages, cast(GpuStep, step), q, c, kv_start)
            out = call_linear(self.o_proj, self._normalize_and_gate(out, hidden_states, fused))
            return tensor_model_parallel_all_reduce(out), None
        out = torch.empty_like(q)
        if step.single:
            out[:, : step.single] = self._attend_single(pages, cast(GpuStep, step), q, c, kv_start)
        for prompts in step.prompts:
            rows = prompts.rows
            gates = log_f[:, rows], kv_start[..., rows]
            out[:, rows] = self._attend_prompts(prompts, q[:, rows], k[:, rows], v[:, rows], *gates)
        for chunk in step.chunks:
            last = torch.arange(chunk.start, chunk.end, device=q.device)
            decay = Decay(c[..., chunk.rows], c[..., chunk.rows], kv_start[..., chunk.rows], last)
            out[:, chunk.rows] = self._attend(pages, chunk, q[:, chunk.rows], decay)
        out = self.o_proj(self._normalize_and_gate(out, hidden_states, fused))
        return tensor_model_parallel_all_reduce(out), None

    def _shift_and_rotate(
        self,
        states: tuple[Tensor, Tensor, Tensor],
        hidden_states: Tensor,
        fused: dict[str, Tensor],
        pages: Any,
        step: Step | GpuStep,
        angles: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them, of those that are projected: token shift, QK-norm, RoPE."""
        previous = {
            name: pages.previous(name, x, step)
            for name, x in (("key", states[1]), ("value", states[2]))
            if name in self.shifted
        }
        logits = fused.get("key_shift.proj"), fused.get("value_shift.proj")
        backend = backend_of(states[0])
        if backend is not PYTORCH and self._can_use_prologue():
            inputs = self._prologue_inputs(states, hidden_states, logits, angles)
            inputs = inputs._replace(key_past=previous.get("key"), value_past=previous.get("value"))
            prepared = backend.prologue(inputs, self.qk_norm_eps)
            if prepared is not None:
                return prepared
            logits = inputs.key_logits, inputs.value_logits
        q, k, v = states
        if "key" in previous:
            k = self.key_shift.mix(hidden_states, k, previous["key"], logits[0])
        if "value" in previous:
            v = self.value_shift.mix(hidden_states, v, previous["value"], logits[1])
        return self._normalize_and_rotate(q, k, v, angles)

    def _attend(self, pages: Pages, chunk: Chunk, q: Tensor, decay: Decay) -> Tensor:
        """``[1, Tq, H, D]`` queries of one request over all of its keys, and the sink."""
        k, v, c = pages.read(chunk)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.settings.implementation, eager_attention_forward)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, _ = attend(self, *heads_first, None, decay=decay._replace(key=c), **self._options(q))
        return out

    def _attend_prompts(
        self, prompts: Prompts, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, kv_start: Tensor
    ) -> Tensor:
        """``[1, T, H, D]`` queries of requests that begin, each over its own keys, and the sink."""
        assert prompts.begins is not None
        v, log_f, broken = prompts.isolated(v, log_f)
        # Pruning relies on sums that fall over all of a row.
        c, _ = backend_of(q).sum_gates(log_f, None, 0)
        decay = Decay(c, c, kv_start + prompts.begins, torch.arange(q.shape[1], device=q.device))
        options = self._options(q)
        if not self.settings.prunes(q.shape[2], prompts.length, prompts.length):
            options["settings"] = self.settings._replace(eps=None)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, _ = fox_attention_forward(self, q, k, v, None, decay=decay, **options)
        return out if broken is None else out.masked_fill(broken[:, None, None], math.nan)

    def _attend_single(self, pages: GpuPages, step: GpuStep, q: Tensor, c: Tensor, kv_start: Tensor) -> Tensor:
        """One query of each of the first requests over their pages, and the sink: ``[1, single, H, D]``."""
        rows = slice(0, step.single)
        assert step.last is not None
        decay = Decay(c[0, :, rows].T[..., None], pages.pools.sums, kv_start[0, :, rows].T[..., None], step.last)
        attended, _ = fox_attention_forward(
            self,
            q[0, rows, :, None],
            pages.pools.keys,
            pages.pools.values,
            None,
            decay=decay,
            view=pages.view(step),
            **self._options(q),
        )
        return attended.transpose(0, 1)

    def _options(self, q: Tensor) -> dict[str, Any]:
        sink = self.sink(q) if self.has_sink else None
        return {"scaling": self.scaling, "settings": self.settings, "sink": sink, "backend": backend_of(q)}
