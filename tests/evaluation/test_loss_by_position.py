"""Loss by position: the model's own loss, token by token, and intervals that cover it."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from foxlm.evaluation import loss_by_position as module
from foxlm.evaluation.loss_by_position import bootstrap_means, by_interval, loss_by_position, row_losses
from foxlm.modeling.versions import CACHE
from models import tiny_model, tokens
from oracles import Counting, CountingConfig, counting_losses


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()


def counting(**fields) -> Counting:
    model = Counting(CountingConfig(**fields)).eval()
    nn.init.eye_(model.lm_head.weight)
    return model


def test_losses_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("pro", dtype=torch.float32).eval(), tokens(3, 50)
    # Parts that do not divide the row.
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7)
    losses = loss_by_position(model, rows)
    assert losses.shape == (3, 49) and losses.dtype == torch.float32
    for end in (2, 30, 50):
        expected = model(rows[:, :end], labels=rows[:, :end]).loss.item()
        assert losses[:, : end - 1].mean().item() == pytest.approx(expected, rel=1e-5)


def test_any_language_model_will_do() -> None:
    model, rows = llama(), tokens(2, 20)
    assert loss_by_position(model, rows).mean().item() == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)


def test_a_model_with_known_losses() -> None:
    row = torch.arange(60)[None]
    for chunk in (0, 7, 60):
        torch.testing.assert_close(loss_by_position(counting(), row, chunk)[0], counting_losses(60).float())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loss_by_position(counting(slope=0.02), row)[0], counting_losses(60).float())


@pytest.mark.parametrize("variant", ["pro", "llama", "rope", "free_dead_cache", "transformers"])
@pytest.mark.parametrize("chunk", [7, 49])
def test_parts_through_a_cache_give_the_losses_of_one_pass(variant: str, chunk: int) -> None:
    if variant == "transformers":
        model = llama().double()
    elif variant == "free_dead_cache":
        model = tiny_model("pro", free_dead_cache=True, acp_eps=1e-9)
    else:
        model = tiny_model(variant)
    rows = tokens(2, 50)
    whole, parts = loss_by_position(model, rows), loss_by_position(model, rows, chunk)
    assert (whole - parts).abs().max() <= 1e-5
    # That it would show: a cache that begins anew with each part.
    if chunk == 7:
        model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {CACHE: None}), with_kwargs=True)
        assert (whole - loss_by_position(model, rows, chunk)).abs().max() > 1e-2


def test_what_a_model_does_behind_its_head_counts() -> None:
    row = torch.arange(60)[None]
    expected = counting_losses(60, slope=0.03).float()
    torch.testing.assert_close(loss_by_position(counting(scale=3.0), row)[0], expected)


@pytest.mark.parametrize("chunk", [0, 8])
def test_one_row_and_the_logits_of_a_part_are_in_memory(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 8)
    model = tiny_model("pro", dtype=torch.float32)
    given: list[weakref.ref] = []
    alive: list[int] = []
    largest: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: largest.append(out.shape[-2]))

    def many() -> Iterator[torch.Tensor]:
        for index in range(3):
            alive.append(sum(one() is not None for one in given))
            row = tokens(40, seed=index)
            given.append(weakref.ref(row))
            yield row
            del row

    assert len([None for _ in row_losses(model, many(), chunk)]) == 3
    assert max(largest) == 8 and max(alive) <= 1


def test_tokens_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows must hold tokens in \[0, 97\), as the model has them, got 2 to 97"):
        loss_by_position(tiny_model(), torch.tensor([[2, 97]]))
    with pytest.raises(ValueError, match="chunk must be 0"):
        loss_by_position(tiny_model(), tokens(1, 4), chunk=-1)


def test_intervals_hold_the_mean_of_their_positions() -> None:
    losses = torch.arange(10.0) + 0.1 * torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    first, second = by_interval(losses, [0, 4, 10])
    assert (first["start"], first["end"], second["start"], second["end"]) == (0, 4, 4, 10)
    assert first["mean"] == pytest.approx(losses[:, :4].mean().item(), rel=1e-5)
    assert first["low"] < first["mean"] < first["high"] < second["low"] < second["mean"] < second["high"]
    # 95% of normal means over 40 rows of 4 numbers each.
    assert first["high"] - first["low"] == pytest.approx(2 * 1.96 * 0.1 / 160**0.5, rel=0.3)
    assert by_interval(losses, [0, 10]) == by_interval(losses, [0, 10])
    (same,) = by_interval(losses - losses, [0, 10])
    assert same["low"] == same["high"] == 0.0


def test_intervals_cover_a_known_mean_as_often_as_they_say() -> None:
    values = 3.0 + torch.randn(30, 400, generator=torch.Generator().manual_seed(1))
    _, low, high = bootstrap_means(values)
    covered = sum(below <= 3.0 <= above for below, above in zip(low, high, strict=True)) / 400
    # A percentile bootstrap of 30 rows is a little short of 95%.
    assert 0.90 <= covered <= 0.97
    missed = sum(below <= 3.5 <= above for below, above in zip(low, high, strict=True)) / 400
    assert missed < 0.5
