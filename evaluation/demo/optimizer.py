"""Muon for the matrices inside the blocks and AdamW for everything else, as one optimizer that Trainer can drive.

On two cores the demo affords some hundred steps. After 250 of them, of 1,024 bytes each, a model of 1.8M parameters
was at 2.40 held-out bits per byte with this, and at 3.48 with AdamW at its best learning rate of those tried.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Below this many rows or columns (forget gates, alphas of token shift) there is nothing to orthogonalize.
_SMALLEST_MATRIX = 16


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers behind one interface; their parameter groups are shared, so that schedules reach both.

    Args:
        model: a language model with ``layers``.
        muon_lr: step of the matrices, on the scale of AdamW's (`adjust_lr_fn="match_rms_adamw"`).
        adamw_lr: step of embeddings, norms, gates and biases.
        weight_decay: of the matrices.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inner = ".layers." in name and parameter.ndim == 2 and min(parameter.shape) >= _SMALLEST_MATRIX
            (matrices if inner else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both; ``closure`` is not accepted."""
        if closure is not None:
            raise ValueError("closure must be None: the gradients are computed before")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
