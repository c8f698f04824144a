"""The loss computed over chunks of tokens equals the loss, and holds only a chunk's logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from foxlm import FoxConfig
from models import SIZES, assert_close, tiny_model, tokens


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def inputs(name: str) -> dict[str, Any]:
    rows = tokens(3, 11)
    labels = rows.masked_fill(rows % 3 == 0, -100)
    given = {"input_ids": rows, "labels": labels}
    if name == "counted":
        given["num_items_in_batch"] = torch.tensor(17)
    elif name == "shifted":
        given["shift_labels"] = tokens(3, 11, seed=1)
    elif name == "masked":
        given["attention_mask"] = (torch.arange(11) >= torch.tensor([[0], [4], [9]])).long()
    return given


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 33, 1000])
@pytest.mark.parametrize("name", ["plain", "counted", "shifted", "masked"])
def test_chunks_change_nothing(name: str, chunk_size: int) -> None:
    whole = tiny_model(tie_word_embeddings=name == "counted").train()
    expected, gradients = loss_and_gradients(whole, **inputs(name))
    whole.config.loss_chunk_size = chunk_size
    loss, in_chunks = loss_and_gradients(whole, **inputs(name))
    # transformers takes the loss in float32.
    assert_close(loss, expected, 1e-6)
    for key, gradient in gradients.items():
        assert_close(in_chunks[key], gradient, 1e-6)


def test_other_terms_and_heads_are_kept() -> None:
    for paid in (3.0, 0.0):
        model = tiny_model(forget_aux_loss_coef=paid).train()
        if not paid:
            # As LoRA has it: a module of its own, whose output is what counts.
            model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
        expected, gradients = loss_and_gradients(model, **inputs("plain"))
        model.config.loss_chunk_size = 5
        loss, in_chunks = loss_and_gradients(model, **inputs("plain"))
        assert_close(loss, expected, 1e-6)
        for key, gradient in gradients.items():
            assert_close(in_chunks[key], gradient, 1e-6)


@pytest.mark.parametrize("settings", [{}, {"loss_chunk_size": 4}, {"forget_aux_loss_coef": 2.0}])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17), 0, torch.tensor(0)])
def test_labels_that_are_all_ignored_have_a_loss_of_zero(settings: dict[str, Any], items: Any) -> None:
    rows = tokens(2, 6)
    given = {"input_ids": rows, "labels": torch.full_like(rows, -100)} | (
        {} if items is None else {"num_items_in_batch": items}
    )
    loss, gradients = loss_and_gradients(tiny_model(**settings).train(), **given)
    # Without the number of a whole batch what heads pay for remembering does not depend on targets.
    paid = items is None and "forget_aux_loss_coef" in settings
    assert loss == 0 or (paid and 0 < loss <= 2)
    assert all(gradient.isfinite().all() and (paid or not gradient.any()) for gradient in gradients.values())


def test_loss_is_that_of_other_models() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    rows = tokens(2, 6)
    logits = torch.randn(2, 6, 97)
    for items in ({}, {"num_items_in_batch": 7}):
        expected = llama.loss_function(logits=logits, labels=rows, vocab_size=97, **items)
        model = tiny_model()
        model.lm_head.forward = lambda *_: logits
        assert_close(model(rows, labels=rows, **items).loss, expected, 1e-6)


class LargestWithWords(TorchDispatchMode):
    """Rows of the largest tensor that has a number for each word."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.ndim and x.shape[-1] == SIZES["vocab_size"]:
                self.rows = max(self.rows, x.numel() // x.shape[-1])
        return out


def test_no_more_logits_than_a_chunk_are_held() -> None:
    model = tiny_model(num_hidden_layers=1).train()
    given = {"input_ids": tokens(2, 100), "labels": tokens(2, 100)}
    for chunk_size, rows in ((16, 16), (None, 200)):
        model.config.loss_chunk_size = chunk_size
        with LargestWithWords() as largest:
            loss_and_gradients(model, **given)
        assert largest.rows == max(rows, SIZES["hidden_size"] if chunk_size else 0), "the head's gradient has rows too"


def test_logits_are_there_outside_of_training_and_without_labels() -> None:
    model = tiny_model(loss_chunk_size=4)
    rows = tokens(1, 6)
    assert model(rows, labels=rows).logits.shape[:2] == (1, 6)
    assert model.train()(rows).logits.shape[:2] == (1, 6)
    assert model(rows, labels=rows).logits is None


@pytest.mark.parametrize("size", [0, -5, 2.5, "many"])
def test_a_chunk_has_tokens(size: Any) -> None:
    with pytest.raises(Exception, match="loss_chunk_size"):
        FoxConfig(loss_chunk_size=size)
