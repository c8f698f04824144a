"""A cache and the tokens that were fed through it: the same operation on both, and a comparison after every step."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from foxlm.modeling.cache.dynamic import DynamicForgettingLayer
from foxlm.modeling.token_layout import TokenLayout
from foxlm.modeling.versions import cache_of
from models import assert_close, tokens


class CachedRun:
    """Sequences fed through a cache, each row checked against a run of that row alone without one."""

    def __init__(self, model: Any, cache: Cache, batch: int = 2) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros(batch, 0, dtype=torch.long)
        self.real = torch.zeros(batch, 0, dtype=torch.long)
        self.steps = 0
        # transformers computes the angles of RoPE in float32.
        self.tolerance = 1e-9 if model.config.rope_parameters is None else 1e-5

    @torch.no_grad()
    def extend(self, count: int, padding: Tensor | None = None) -> "CachedRun":
        """Feed random tokens, ``padding`` of which (``[B, count]``, nonzero) are padding; compare their logits."""
        self.steps += 1
        new = tokens(len(self.ids), count, seed=self.steps)
        real = torch.ones_like(new) if padding is None else (padding == 0).long()
        self.ids = torch.cat([self.ids, new], dim=1)
        self.real = torch.cat([self.real, real], dim=1)
        positions = (self.real.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        mask = None if self.real.all() else self.real
        out = self.model(new, attention_mask=mask, position_ids=positions, cache=self.cache, use_cache=True)
        assert cache_of(out) is self.cache
        for row, keep in enumerate(self.real.bool()):
            expected = self.model(self.ids[row, keep][None], use_cache=False).logits[0] if keep.any() else None
            kept = real[row].bool()
            if kept.any():
                assert expected is not None
                assert_close(out.logits[row, kept], expected[-int(kept.sum()) :], self.tolerance)
        return self

    def _rows(self, index: Tensor) -> None:
        self.ids, self.real = self.ids[index], self.real[index]

    def reorder(self, index: list[int]) -> "CachedRun":
        self.cache.reorder_cache(torch.tensor(index))
        self._rows(torch.tensor(index))
        return self

    def repeat(self, count: int) -> "CachedRun":
        self.cache.batch_repeat_interleave(count)
        self._rows(torch.arange(len(self.ids)).repeat_interleave(count))
        return self

    def select(self, index: list[int]) -> "CachedRun":
        self.cache.batch_select_indices(torch.tensor(index))
        self._rows(torch.tensor(index))
        return self

    def crop(self, count: int) -> "CachedRun":
        self.cache.crop(-count)
        keep = self.ids.shape[1] - count
        self.ids, self.real = self.ids[:, :keep], self.real[:, :keep]
        return self

    def offload(self) -> "CachedRun":
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()
        return self

    def reset(self) -> "CachedRun":
        self.cache.reset()
        self.ids, self.real = self.ids[:, :0], self.real[:, :0]
        return self


APPEND_GATES = DynamicForgettingLayer.append_gates


def restart_sum(
    layer: DynamicForgettingLayer, log_f: Tensor, layout: TokenLayout, backend: Any, few: bool = False
) -> Any:
    """`append_gates` whose running sum begins anew at every step."""
    before = layer.gates
    APPEND_GATES(layer, log_f, layout, backend, few)
    decay = layer._new
    assert decay is not None
    if before is None:
        return
    query = decay.query - before[0][..., -1:]
    key = torch.cat([before[0], query], dim=-1)
    assert layer.gates is not None
    layer.gates = (key, layer.gates[1])
    layer._new = decay._replace(query=query, key=key)
