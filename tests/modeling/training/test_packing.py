"""Packed sequences give what each gives alone: logits, loss and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from foxlm.modeling.versions import cache_of
from models import IMPLEMENTATIONS, assert_close, tiny_model, tokens

LENGTHS = (5, 1, 8, 3)
VARIANTS = ("pro", "llama", "rope", "key-value-gates", "bias-only", "gateless")


def sequences() -> list[Tensor]:
    return [tokens(length, seed=length) for length in LENGTHS]


def packed(flash: bool) -> dict[str, Any]:
    """What the collator makes of them; flash: offsets beside the positions."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_position_ids=True)
    batch = collator([{"input_ids": ids.tolist()} for ids in sequences()])
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    assert ("cu_seq_lens_q" in batch) == flash
    return batch


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Summed over the batches, as a mean over all the labels that there are."""
    model.zero_grad()
    count = sum(length - 1 for length in LENGTHS)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_is_separate(variant: str, implementation: str, flash: bool) -> None:
    model = tiny_model(variant).train()
    model.set_attn_implementation(implementation)
    batch = packed(flash)
    # transformers computes the angles of RoPE in float32.
    tolerance = 1e-9 if model.config.rope_parameters is None else 1e-5
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        expected = torch.cat([model(ids[None]).logits for ids in sequences()], dim=1)
    assert_close(logits, expected, tolerance)
    loss, gradients = loss_and_gradients(model, [batch])
    separate = [{"input_ids": ids[None], "labels": ids[None]} for ids in sequences() if len(ids) > 1]
    expected_loss, expected_gradients = loss_and_gradients(model, separate)
    assert abs(loss - expected_loss) < 1e-6 * expected_loss  # transformers takes the loss in float32
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 1e-6 if model.config.rope_parameters is None else 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("flash", [True, False])
def test_packed_and_cached_goes_on_from_the_last_sequence(flash: bool) -> None:
    model = tiny_model()
    batch = {k: v for k, v in packed(flash).items() if k != "labels"}
    cache = cache_of(model(**batch, use_cache=True))
    new = tokens(1, 4, seed=9)
    position_ids = torch.arange(LENGTHS[-1], LENGTHS[-1] + 4)[None]
    logits = model(new, cache=cache, position_ids=position_ids, use_cache=True).logits
    expected = model(torch.cat([sequences()[-1][None], new], dim=1)).logits[:, -4:]
    assert_close(logits, expected)


@torch.no_grad()
def test_control_packing_matters() -> None:
    """Without its marks the row is one sequence, and differs."""
    for variant in VARIANTS:
        model = tiny_model(variant)
        ids = packed(False)["input_ids"]
        expected = torch.cat([model(x[None]).logits for x in sequences()], dim=1)
        assert (model(ids).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_positions_that_do_not_restart_are_no_packing() -> None:
    model = tiny_model()
    ids = tokens(2, 6)
    expected = model(ids).logits
    assert_close(model(ids, position_ids=torch.arange(6)[None]).logits, expected, 0)
    assert_close(model(ids, position_ids=torch.arange(10, 16)[None].expand(2, -1)).logits, expected, 0)


@torch.no_grad()
def test_positions_may_restart_differently_in_each_row() -> None:
    model = tiny_model()
    ids = tokens(2, 6)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]])
    logits = model(ids, position_ids=positions).logits
    for row, cut in ((0, 4), (1, 1)):
        parts = [model(ids[row : row + 1, part]).logits for part in (slice(0, cut), slice(cut, None))]
        assert_close(logits[row : row + 1], torch.cat(parts, dim=1))


@torch.no_grad()
def test_empty_sequences_are_allowed() -> None:
    model = tiny_model()
    ids = tokens(1, 6)
    expected = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    for offsets in ([0, 4, 6], [0, 0, 4, 4, 6, 6]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        assert_close(model(ids, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens).logits, expected)


@pytest.mark.parametrize(
    "offsets",
    [
        torch.tensor([0, 4, 5]),
        torch.tensor([0, 4, 7]),
        torch.tensor([1, 4, 6]),
        torch.tensor([0, 5, 4, 6]),
        torch.tensor([0.0, 4.0, 6.0]),
        torch.tensor([[0, 4, 6]]),
        torch.tensor([0]),
    ],
)
def test_wrong_offsets_are_refused(offsets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cu_seq_lens_q must .*got"):
        tiny_model()(tokens(1, 6), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


def test_offsets_of_keys_that_are_not_those_of_queries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cu_seq_lens_k"):
        tiny_model()(tokens(1, 6), cu_seq_lens_q=torch.tensor([0, 4, 6]), cu_seq_lens_k=torch.tensor([0, 3, 6]))


@torch.no_grad()
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_packing_and_padding_go_together(variant: str, flash: bool) -> None:
    model = tiny_model(variant)
    ids = tokens(1, 12)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, [0, 3, 6, 11]] = 0
    # Two sequences of real tokens 1, 2, 4 and 5, 7, 8, 9, 10; what positions padding has does not matter.
    positions = torch.tensor([[1, 0, 1, 1, 2, 0, 1, 1, 2, 3, 4, 1]])
    marks = {"cu_seq_lens_q": torch.tensor([0, 5, 12])} if flash else {"position_ids": positions}
    logits = model(ids, attention_mask=mask, **marks).logits
    for sequence in ([1, 2, 4], [5, 7, 8, 9, 10]):
        assert_close(logits[:, sequence], model(ids[:, sequence]).logits)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_offsets_alone_put_the_sink_at_the_beginning_of_each_sequence(implementation: str, padded: bool) -> None:
    """The key of a sink is at position 0, so a rotated query sees where its sequence begins."""
    model = tiny_model("rope-sink", attn_implementation=implementation)
    ids = tokens(1, 12)
    # The third sequence begins with padding, which counts for no position.
    rows = [[1, 2, 4], [5], [8, 9, 10, 11]] if padded else [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]]
    mask = torch.zeros(1, 12, dtype=torch.long)
    mask[0, [token for row in rows for token in row]] = 1
    logits = model(ids, attention_mask=mask, cu_seq_lens_q=torch.tensor([0, 5, 6, 12])).logits
    for row in rows:
        # transformers computes the angles of RoPE in float32.
        assert_close(logits[:, row], model(ids[:, row]).logits, 1e-5)


@torch.no_grad()
def test_positions_restart_under_compilation_too() -> None:
    model = tiny_model()
    batch = {k: v for k, v in packed(False).items() if k != "labels"}
    expected = model(**batch).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(**batch).logits, expected)
    mask = torch.ones_like(batch["input_ids"])
    assert_close(model(**batch, attention_mask=mask).logits, expected)
    assert_close(compiled(**batch, attention_mask=mask).logits, expected)


def test_offsets_beside_a_batch_or_a_cache_are_refused() -> None:
    model = tiny_model()
    offsets = torch.tensor([0, 4, 6])
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .*batch of 2"):
        model(tokens(2, 6), cu_seq_lens_q=offsets)
    cache = cache_of(model(tokens(1, 3), cache=DynamicCache(config=model.config), use_cache=True))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .*earlier tokens: True"):
        model(tokens(1, 6), cu_seq_lens_q=offsets, cache=cache, use_cache=True)


class Documents(Dataset):
    """Random documents of the given lengths."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.rows = [tokens(length, seed=index).tolist() for index, length in enumerate(lengths)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index]}


def one_by_one(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A document as a row, its first token nobody's target, as packing has it."""
    assert len(features) == 1
    ids = torch.tensor([features[0]["input_ids"]])
    return {"input_ids": ids, "labels": ids.index_fill(1, torch.tensor([0]), -100)}


def test_trainer_packs_long_ragged_documents_as_if_they_came_one_by_one(tmp_path: Path) -> None:
    """One step of plain gradient descent: loss, and by the weights every gradient."""
    documents = Documents((1100, 1, 257, 2, 64, 65, 1, 511, 47))
    ends = []
    for packs in (True, False):
        rows = len(documents) if packs else 1
        model = tiny_model("pro", dtype=torch.float32, loss_chunk_size=500 if packs else None).train()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=len(documents) // rows,
            **{"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"},
            **{"max_grad_norm": 0.0, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        )
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if packs else one_by_one
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        loss = Trainer(model, arguments, train_dataset=documents, data_collator=collator).train().training_loss
        ends.append((loss, {name: weight - before[name] for name, weight in model.named_parameters()}))
    (packed_loss, packed_steps), (loss, steps) = ends
    assert abs(packed_loss - loss) < 1e-5 * loss
    for name, step in steps.items():
        assert step.abs().max() > 1e-4
        assert_close(packed_steps[name], step, 1e-5)
