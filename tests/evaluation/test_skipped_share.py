"""`skipped_share` of batches as they are trained on, and `FoxTrainer`, which logs it beside tokens per second."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, TrainerCallback, TrainingArguments

from foxlm.evaluation.gates import skipped_shares
from foxlm.evaluation.recording import record_attention, replaced_attention
from foxlm.evaluation.skipped_share import skipped_share
from foxlm.kernels.decay import Decay, without_padding
from foxlm.modeling.attention_implementations import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, pruned
from foxlm.modeling.modeling_fox import FoxForSequenceClassification
from foxlm.training import FoxTrainer
from models import IMPLEMENTATIONS, tiny_model, tokens

# Rows that share a block of 128 queries, one that fills some, and one that ends within a block.
LENGTHS = (70, 300, 41)


def forgetful(variant: str = "pro", **overrides: Any) -> Any:
    return tiny_model(variant, decay_time_max=8.0, initializer_range=0.1, dtype=torch.float32, **overrides).train()


def batches() -> dict[str, dict[str, Tensor]]:
    rows = [tokens(length, seed=length) for length in LENGTHS]
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    padded = torch.zeros(2, 300, dtype=torch.int64)
    padded[0, 230:], padded[1] = rows[0], rows[1]
    return {
        "plain": {"input_ids": rows[1][None]},
        "positions": {"input_ids": packed, "position_ids": positions},
        "offsets": {"input_ids": packed, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets},
        "padded": {"input_ids": padded, "attention_mask": (padded != 0).long()},
    }


def count_tiles(first: Tensor, last: Tensor) -> int:
    """Tiles in which some query sees some key, one by one."""
    keys = torch.arange(int(last[-1]) + 1)
    seen = (keys >= first[..., None]) & (keys <= last[:, None])
    return sum(
        bool(tile.any()) for rows in seen.flatten(0, -3) for part in rows.split(128) for tile in part.split(64, 1)
    )


@pytest.mark.parametrize("rule", ["paper", "tight"])
@pytest.mark.parametrize("variant", ["pro", "llama", "key-value-gates", "sink"])
@pytest.mark.parametrize("kind", ["plain", "positions", "offsets", "padded"])
def test_it_is_the_share_of_tiles_that_pruning_hides(kind: str, variant: str, rule: str) -> None:
    model, batch = forgetful(variant, acp_rule=rule, acp_eps=1e-2), batches()[kind]
    counted: list[tuple[int, int]] = []
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("fox", eager_attention_forward)

    def counting(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, decay: Decay, **kwargs: Any
    ) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        q, k, _ = without_padding(q, k, v, decay, kwargs["real"])
        before = decay.kv_start.expand(-1, 4 if decay.kv_start.shape[1] == 1 else -1, -1)
        before = before.repeat_interleave(4 // before.shape[1], dim=1)
        options = {"sink": kwargs["sink"]}
        after = pruned(
            module, kwargs["settings"], q, k, decay, kwargs["scaling"], kwargs["backend"], **options
        ).kv_start
        counted.append((count_tiles(before, decay.last), count_tiles(after, decay.last)))
        return attend(module, query, key, value, mask, decay=decay, **kwargs)

    with torch.no_grad(), replaced_attention("fox", counting):
        model.eval()(**batch, use_cache=False)
    before, after = (sum(x) for x in zip(*counted, strict=True))
    assert before > after, "the test has something to measure"
    share = skipped_share(model, batch | {"labels": batch["input_ids"], "seq_idx": None})
    assert share is not None and abs(share.item() - (1 - after / before)) < 1e-12


def test_without_padding_and_packing_it_is_that_of_recorded_attention() -> None:
    for implementation in IMPLEMENTATIONS:
        model, batch = forgetful(acp_eps=1e-2), {"input_ids": tokens(2, 300)}
        model.set_attn_implementation(implementation)
        with torch.no_grad(), record_attention(model.eval()) as layers:
            model(**batch, use_cache=False)
        expected = skipped_shares(layers, [torch.tensor(1e-2).double().log().item()], "tight", 128, 64).mean()
        share = skipped_share(model, batch)
        assert share is not None
        torch.testing.assert_close(share, expected, rtol=1e-6, atol=0)


def test_it_changes_nothing() -> None:
    model, batch = forgetful(attention_dropout=0.3), batches()["positions"]
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    table, state = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), torch.get_rng_state()
    first, second = skipped_share(model, batch), skipped_share(model, batch)
    assert first is not None and first == second and not first.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert table == ALL_ATTENTION_FUNCTIONS._local_mapping
    assert all(weight.grad is None for weight in model.parameters())


def test_compiled_layers_are_not_compiled_again() -> None:
    model, batch = forgetful(), {"input_ids": tokens(2, 80)}
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend, dynamic=False)
    model(**batch).logits.sum().backward()
    graphs = len(compiled)
    assert graphs and skipped_share(model, batch) is not None
    model(**batch).logits.sum().backward()
    assert len(compiled) == graphs


def test_none_where_nothing_prunes_or_there_are_no_tokens() -> None:
    batch = {"input_ids": tokens(1, 80)}
    assert skipped_share(forgetful(acp_eps=None), batch) is None
    assert skipped_share(forgetful("gateless"), batch) is None
    assert skipped_share(torch.nn.Linear(2, 2), batch) is None
    assert skipped_share(forgetful(), {"labels": batch["input_ids"]}) is None
    assert skipped_share(forgetful(), batch) is not None
    assert skipped_share(tiny_model(model_class=FoxForSequenceClassification), batch) is not None


class Reporting(TrainerCallback):
    """Stands before all others, where callbacks of `report_to` cannot be later."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def new_trainer(model: Any, folder: Path, **arguments: Any) -> FoxTrainer:
    rows = [{"input_ids": tokens(1, 40 + index, seed=index)[0].tolist()} for index in range(16)]
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    options |= {"logging_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    training = TrainingArguments(str(folder), **(options | arguments))
    return FoxTrainer(
        model, training, train_dataset=rows, eval_dataset=rows[:2], data_collator=DataCollatorWithFlattening()
    )


def test_trainer_reports_both_numbers_and_trains_the_same(tmp_path: Path) -> None:
    runs = []
    for steps in (1, 4):
        trainer, reporting = new_trainer(forgetful(attention_dropout=0.2), tmp_path, logging_steps=steps), Reporting()
        trainer.callback_handler.callbacks.insert(0, reporting)
        trainer.train()
        logged = [logs for logs in reporting.logged if "loss" in logs]
        assert len(logged) == 4 // steps
        for logs in logged:
            assert logs["tokens_per_second"] > 0 and 0 <= logs["skipped_share"] < 1
        runs.append([weight.detach().clone() for weight in trainer.model.parameters()])
        last = reporting.logged[-1]
        tokens_seen = last["train_tokens_per_second"] * last["train_runtime"]
        assert abs(tokens_seen - sum(40 + index for index in range(16))) < 0.02 * tokens_seen
        assert "train_samples_per_second" not in last
        assert trainer.state.log_history[-2]["skipped_share"] == logged[-1]["skipped_share"]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True)), "measuring more often changes no weight"


def test_trainer_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    trainer = new_trainer(forgetful(acp_eps=None), tmp_path)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("tokens_per_second" in entry and "skipped_share" not in entry for entry in logged)


def test_trainer_counts_no_padding_and_no_evaluation(tmp_path: Path) -> None:
    trainer = new_trainer(forgetful(), tmp_path, max_steps=1, logging_steps=1)
    trainer._batch = {"input_ids": tokens(1, 80)}
    trainer._since = 10.0
    trainer.evaluate()
    assert trainer._since > 10.0
    batch = batches()["padded"]
    trainer.train()
    trainer.training_step(trainer.model, trainer._prepare_inputs(batch | {"labels": batch["input_ids"]}))
    assert trainer._count_tokens() == LENGTHS[0] + LENGTHS[1]


def test_tensorboard_gets_both_numbers(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    new_trainer(forgetful(), tmp_path, report_to="tensorboard").train()
    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    events = accumulators.EventAccumulator(str(folder)).Reload()
    for name in ("train/tokens_per_second", "train/skipped_share"):
        assert [event.step for event in events.Scalars(name)] == [2, 4]
