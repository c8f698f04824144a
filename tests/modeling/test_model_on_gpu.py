"""Models where only a GPU can show it: device placement, CUDA graphs, offloaded caches, half precision."""

from typing import Any

import pytest
import torch

from foxlm import FoxForCausalLM, forgetting_attention
from models import VARIANTS, tiny_config, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def gpu_model(variant: str = "pro", dtype: torch.dtype = torch.float32) -> FoxForCausalLM:
    torch.manual_seed(0)
    # SDPA's kernels want heads of at least 16.
    config = tiny_config(**VARIANTS[variant], head_dim=16)
    return FoxForCausalLM(config).to(device="cuda", dtype=dtype).eval()


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["fox_reference", "sdpa", "eager"])
@pytest.mark.parametrize("variant", ["pro", "llama", "rope", "key-value-gates", "olmo"])
def test_implementations_agree_with_the_cpu(variant: str, implementation: str) -> None:
    model = gpu_model(variant)
    ids = tokens(3, 90)
    mask = torch.ones_like(ids)
    mask[0, :30] = mask[1, 70:] = mask[2, 40:50] = 0
    expected = model.cpu().double()(ids, attention_mask=mask).logits[mask.bool()]
    model.float().cuda().set_attn_implementation(implementation)
    found = model(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[mask.bool()]
    assert relative(found, expected) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["fox_reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_own_rounding(implementation: str, dtype: torch.dtype) -> None:
    ids = tokens(2, 60).cuda()
    expected = gpu_model()(ids).logits
    model = gpu_model(dtype=dtype)
    model.set_attn_implementation(implementation)
    # Some ten roundings lie between input and logits.
    assert relative(model(ids).logits, expected) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
    ],
    ids=["dynamic", "static, compiled", "offloaded", "beam", "prompt lookup"],
)
def test_generation_equals_the_run_without_a_cache(options: dict[str, Any]) -> None:
    model = gpu_model(dtype=torch.float64)
    ids = tokens(1 if "prompt_lookup_num_tokens" in options else 3, 17).cuda()
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :5] = 0
    beams = {"num_beams": options["num_beams"]} if "num_beams" in options else {}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY, **beams)
    for _ in range(2):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **options), expected)


def test_compiled_training_step_has_the_same_gradients() -> None:
    model = gpu_model().train()
    ids = tokens(2, 64).cuda()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert relative(weight.grad, expected[name]) < 1e-4, name


def test_autocast_leaves_attention_and_gates_in_float32() -> None:
    model = gpu_model().train()
    ids = tokens(2, 64).cuda()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, labels=ids).loss
        gates = model.model.layers[0].self_attn.forget_gate(torch.randn(2, 3, 32, device="cuda"))
    loss.backward()
    assert gates.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 0.02


def test_attention_of_long_sequences_stays_exact() -> None:
    """Fast gates at 65,536 tokens: a float32 running sum would be off by 1e-3."""
    torch.manual_seed(0)
    q = torch.randn(1, 64, 2, 16, device="cuda")
    k, v = torch.randn(2, 1, 65536, 2, 16, device="cuda").unbind()
    log_f = -torch.rand(1, 65536, 2, device="cuda") * 2
    exact = forgetting_attention(q.double(), k.double(), v.double(), log_f.double())
    assert relative(forgetting_attention(q, k, v, log_f), exact) < 1e-6
