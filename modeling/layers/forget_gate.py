"""Forget gates: `full`, `bias_only` and `fixed` (Forgetting Transformer, arXiv 2503.02130)."""

import math

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from ...kernels.elementwise.gate_logits import gate_logits
from ..configuration_fox import FoxConfig
from ..parallel.tensor_parallel import local_part

_FEW_TOKENS = 16
# Bias of a gate that never forgets: its log sigmoid and the derivative of that are exactly 0 in float32, and every
# dtype holds it.
_NEVER_FORGETS = 128.0


def log_spaced_times(low: float, high: float, gates: int) -> Tensor:
    """``[gates]`` float64 decay times from ``low`` to ``high``."""
    return torch.linspace(math.log(low), math.log(high), gates, dtype=torch.float64).exp()


def bias_for_times(times: Tensor) -> Tensor:
    """Float64 gate biases ``b = -log(expm1(1 / T))``, with which ``log sigmoid(b) = -1 / T``; 0 for infinite times."""
    rates = 1.0 / times.double()
    # Written so that it does not overflow for short times.
    return (-rates - torch.log(-torch.expm1(-rates))).clamp(max=_NEVER_FORGETS)


def decay_time_bias(config: FoxConfig) -> Tensor:
    """``[Hf]`` float64 gate biases for the decay times of a configuration, log-spaced over the heads."""
    return bias_for_times(log_spaced_times(config.decay_time_min, config.decay_time_max, config.num_forget_gates))


def _gate_dtype() -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class FoxForgetGate(nn.Linear):
    """Data-dependent forget gate: ``[B, T, hidden] -> [B, T, Hf]`` logits in float32, whatever the model's dtype.

    Half precision could not tell a slow gate, ``log f = -1e-3``, from its neighbors. The weights stay in float32 too in
    a model made or loaded in half precision, but not after `model.to(dtype)`.
    """

    def __init__(self, hidden_size: int, gates: int) -> None:
        super().__init__(hidden_size, gates, dtype=_gate_dtype())

    def forward(self, x: Tensor, log_sigmoid: bool = False) -> Tensor:
        """Logits; or in eager mode their `logsigmoid`, which is then no launch of its own."""
        with maybe_autocast(x.device.type, enabled=False):
            if not torch.compiler.is_compiling():
                # Imported when they are used, since importing the kernels takes time.
                from ...kernels.backends import elementwise_backend_of

                return elementwise_backend_of(x).gate_logits(x, self.weight, self.bias, log_sigmoid)
            # An exported program takes any number of tokens, and must not be specialized on one side of the limit.
            traced = not torch.compiler.is_exporting()
            if traced and not torch.is_grad_enabled() and x.shape[:-1].numel() <= _FEW_TOKENS:
                # A compiled decoding step: fused with its neighbors, where a float32 matmul would be two more launches.
                dtype = torch.promote_types(x.dtype, torch.float32)
                return (x.to(dtype)[..., None, :] * self.weight.to(dtype)).sum(-1) + self.bias.to(dtype)
            return gate_logits(x, self.weight, self.bias)


class FoxConstantGate(nn.Module):
    """Forget gate that does not depend on the data: logits ``b``, learned (`bias_only`) or not (`fixed`)."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.learned = config.forget_gate == "bias_only"
        # A parameter even if fixed: tensor parallelism shards parameters, not buffers.
        self.bias = nn.Parameter(decay_time_bias(config).to(_gate_dtype()), requires_grad=self.learned)

    def forward(self, x: Tensor) -> Tensor:
        bias = local_part(self.bias).to(torch.promote_types(x.dtype, torch.float32))
        # Detached, so that setting requires_grad on a whole model does not train what its configuration calls fixed.
        return (bias if self.learned else bias.detach()).expand(*x.shape[:-1], -1)


def make_forget_gate(config: FoxConfig) -> FoxForgetGate | FoxConstantGate:
    """The gate that ``config.forget_gate`` names, which is not ``none``."""
    if config.forget_gate == "full":
        gate = FoxForgetGate(config.hidden_size, config.num_forget_gates)
        with torch.no_grad():
            gate.bias.copy_(decay_time_bias(config))
        return gate
    return FoxConstantGate(config)
