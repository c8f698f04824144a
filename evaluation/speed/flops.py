"""Floating-point operations of a training step, and what share of a GPU's peak they are.

Three counts, none of which is another's short name:

* model: ``6 N T + 12 L H D T^2 / 2``, the custom for MFU: ``N`` the weights that multiply each token (all but the input
  embedding), forward once and backward twice, causal attention without pruning.
* kept: the same with only the tiles of attention that pruning keeps.
* done: what the GPU computes: the kept tiles, the backward pass of attention with the five products that it needs (the
  custom counts four), and with checkpointing the layers' forward pass twice.
"""

from dataclasses import dataclass

import torch
from torch import nn

from foxlm import FoxForCausalLM

from .timing import Matmul, interleaved

# Dense bfloat16 products per second by NVIDIA's data sheets, for names as torch gives them.
_PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100-SXM4": 312e12, "A100 80GB": 312e12}
_PEAK_ROUNDS = 5


@dataclass(frozen=True)
class StepWork:
    """Sizes that the counts need.

    Attributes:
        weights: parameters without the input embedding (``N``).
        layer_weights: those of the decoder layers.
        tokens: of one sequence (``T``), the only one of a step on one GPU.
        layers: decoder layers (``L``).
        width: query heads times their size (``H D``).
        checkpointing: whether layers compute forward twice.
    """

    weights: int
    layer_weights: int
    tokens: int
    layers: int
    width: int
    checkpointing: bool

    @classmethod
    def of(cls, model: FoxForCausalLM, tokens: int, checkpointing: bool) -> "StepWork":
        """The sizes of a model that is not sharded."""
        config = model.config
        heads, _, head_dim = config.heads
        total, layers = count(model), count(model.model.layers)
        embedding = 0 if config.tie_word_embeddings else count(model.model.embed_tokens)
        return cls(total - embedding, layers, tokens, config.num_hidden_layers, heads * head_dim, checkpointing)

    @property
    def _product(self) -> float:
        """One causal product of attention, ``Q K^T`` or ``P V``, in all layers."""
        return 2.0 * self.layers * self.width * self.tokens**2 / 2.0

    def model(self, kept: float = 1.0) -> float:
        """By the custom for MFU, with the share ``kept`` of the tiles of attention."""
        return 6.0 * self.weights * self.tokens + 3.0 * 2.0 * self._product * kept

    def done(self, kept: float) -> float:
        """What is computed, with the share ``kept`` of the tiles."""
        again = 2.0 * self.layer_weights * self.tokens + 2.0 * self._product * kept if self.checkpointing else 0.0
        return 6.0 * self.weights * self.tokens + 7.0 * self._product * kept + again

    def rates(self, kept: float, seconds: float, peak: float | None) -> dict[str, float | None]:
        """What they come to in ``seconds``.

        Returns:
            ``model_tflops`` per second, and the shares of ``peak`` that the three counts are: ``mfu``, ``mfu_kept``,
            ``hfu``; None where the peak is unknown.
        """
        shares = {"mfu": self.model(), "mfu_kept": self.model(kept), "hfu": self.done(kept)}
        of_peak = {name: None if peak is None else flops / seconds / peak for name, flops in shares.items()}
        return {"model_tflops": self.model() / seconds / 1e12, **of_peak}


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def datasheet_peak(device: str) -> float | None:
    """Dense bfloat16 operations per second that the vendor states for the GPU; None for one that we do not know."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def matmul_rate(device: str) -> float:
    """Operations per second of a large square bfloat16 product, measured."""
    matmul = Matmul(device, torch.bfloat16)
    return 1e3 * matmul.flops / interleaved({"matmul": matmul}, _PEAK_ROUNDS, device)["matmul"].ms
