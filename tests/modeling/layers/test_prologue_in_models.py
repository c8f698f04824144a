"""Models with token shift, QK-norm and RoPE in one kernel equal those that call the modules one by one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.kernels import backends
from foxlm.kernels.backends import PYTORCH, TRITON, backend_of
from kernel_device import DEVICE, INTERPRETED, ON_KERNELS
from models import ROPE, assert_close, tiny_model, tokens

pytestmark = ON_KERNELS

VARIANTS = ["pro", "shared-qk-norm", "partial-rope", "pro-no-qk-norm", "llama-value-shift", "odd-head"]
LENGTH = 12
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
    "paged": lambda config: FoxPagedCache(config, max_cache_len=LENGTH),
}


class Backends:
    """Which backend models get: kernels with or without that of the prologue, whose calls are counted."""

    def __init__(self) -> None:
        self.fuses = True
        self.fused = 0

    def __call__(self, q: Tensor) -> backends.Backend:
        backend = backend_of(q)
        return backend._replace(prologue=self.prologue if self.fuses else PYTORCH.prologue)

    def prologue(self, *inputs: Any) -> Any:
        result = TRITON.prologue(*inputs)
        self.fused += result is not None
        return result


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backends]:
    chosen = Backends()
    monkeypatch.setattr(backends, "backend_of", chosen)
    yield chosen


def model_of(variant: str, **overrides: Any) -> FoxForCausalLM:
    return tiny_model(variant, dtype=torch.float32, initializer_range=0.1, **overrides).to(DEVICE)


def both(chosen: Backends, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``run`` returns with the kernel, which must have run, and without."""
    chosen.fuses, chosen.fused = True, 0
    found = run()
    assert chosen.fused > 0
    chosen.fuses = False
    return found, run()


@pytest.mark.parametrize("variant", ["pro", "partial-rope"] if INTERPRETED else VARIANTS)
def test_logits_and_gradients(variant: str, chosen: Backends) -> None:
    model = model_of(variant)
    ids = tokens(2, LENGTH).to(DEVICE)

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = model(ids, labels=ids).loss
        return loss, list(torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad]))

    (loss, grads), (expected_loss, expected) = both(chosen, run)
    assert_close(loss, expected_loss, 1e-6)
    for x, y in zip(grads, expected, strict=True):
        assert_close(x, y, 1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache(cache: str, padded: bool, chosen: Backends) -> None:
    """A prompt, several tokens, then one: logits, and the unshifted states that the cache keeps."""
    model = model_of("pro", **ROPE)
    ids = tokens(2, LENGTH).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        # Left, in between, and last.
        mask[0, :2] = mask[1, 3] = mask[1, 6] = 0

    @torch.no_grad()
    def run() -> tuple[Tensor, list[Tensor]]:
        held, logits, seen = CACHES[cache](model.config), [], 0
        for count in (7, 3, 1, 1):
            inputs = {"attention_mask": mask[:, : seen + count]} if padded else {}
            logits.append(model(ids[:, seen : seen + count], past_key_values=held, **inputs).logits)
            seen += count
        layer: Any = held.layers[1]
        states = layer.recent if cache == "paged" else layer.unshifted
        return torch.cat(logits, 1)[mask.bool()], [states[name] for name in ("key", "value")]

    (logits, states), (expected, expected_states) = both(chosen, run)
    assert_close(logits, expected, 1e-5)
    for x, y in zip(states, expected_states, strict=True):
        assert_close(x, y, 1e-5)


def test_packed_sequences(chosen: Backends) -> None:
    model = model_of("pro")
    ids = tokens(1, LENGTH).to(DEVICE)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]]).to(DEVICE)

    def run() -> tuple[Tensor, Tensor]:
        loss = model(ids, position_ids=positions, labels=ids).loss
        return loss, torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]

    found, expected = both(chosen, run)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-5)


@pytest.mark.parametrize("hook", ["forward", "backward", "replaced"])
def test_a_module_that_does_more_is_called(hook: str, chosen: Backends) -> None:
    model = model_of("pro", num_hidden_layers=1)
    ids, calls = tokens(1, 3).to(DEVICE), []
    attention: Any = model.model.layers[0].self_attn
    norm = attention.k_norm
    if hook == "forward":
        norm.register_forward_hook(lambda *_: calls.append(1))
    elif hook == "backward":
        norm.register_full_backward_hook(lambda *_: calls.append(1))
    else:
        attention.k_norm = torch.nn.Sequential(norm)
    model(ids, labels=ids).loss.backward()
    assert chosen.fused == 0 and (calls or hook == "replaced")


def test_other_implementations_and_padded_training_call_modules(chosen: Backends) -> None:
    ids = tokens(2, LENGTH).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    model_of("pro")(ids, attention_mask=mask).logits.sum().backward()
    model_of("olmo")(ids)
    model_of("pro", attn_implementation="eager")(ids)
    assert chosen.fused == 0
