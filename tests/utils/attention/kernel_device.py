"""Where tests of the Triton kernels run: on a GPU or, with ``TRITON_INTERPRET=1``, on the CPU.

Triton decides that when a kernel is defined, so the tests marked `kernels` run in processes of their own: see
`make test-slow`.
"""

import pytest
import torch
from torch import Tensor

from foxlm.kernels.backends import PYTORCH, backend_of

INTERPRETED = backend_of(torch.empty(0)) is not PYTORCH
DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter multiplies bfloat16 as if it were integers; the kernels treat float16 no differently.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# For what does not hang on the type: float32 has small tiles, which are slow to interpret.
SOME_DTYPES = [torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16]

# For `pytestmark`. The mark `gpu` keeps these tests out of the ordinary runs on the CPU.
ON_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.kernels,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU or TRITON_INTERPRET=1"),
]
ONLY_COMPILED = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")

# For tests that run the same in PyTorch: those on the CPU take kernels when interpreted.
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.kernels),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
    ),
]


def on_device(inputs: list[Tensor]) -> list[Tensor]:
    """The same leaves where kernels run."""
    return [x.detach().to(DEVICE).requires_grad_() for x in inputs]


def on_cpu(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in results.items()}
