"""Train the demo's model through transformers' Trainer, within a given time or number of steps."""

import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.modeling_fox import FoxForCausalLM

from ..loss_by_position import row_losses
from .corpus import SEPARATOR, Corpus, to_tokens, windows
from .optimizer import MuonAndAdamW
from .tokenizer import VOCAB_SIZE, byte_tokenizer

IGNORED = -100  # transformers' label of a token that is not scored


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training.

    Attributes:
        hidden_size, intermediate_size, layers, heads: of the model, a FoX (Pro).
        length: tokens per training window.
        batch: windows per step.
        muon_lr, adamw_lr: peak learning rates of `MuonAndAdamW`.
        warmup_steps: of the linear warm-up; then the rates fall linearly to zero.
        evaluations: times that the held-out loss is measured along the way.
        evaluation_windows: held-out windows it is measured on.
        smallest, largest: bounds of the number of steps that are fitted into a time.
    """

    hidden_size: int = 192
    intermediate_size: int = 448
    layers: int = 4
    heads: int = 4
    length: int = 256
    batch: int = 4
    muon_lr: float = 0.008
    adamw_lr: float = 0.004
    weight_decay: float = 0.1
    warmup_steps: int = 20
    evaluations: int = 8
    evaluation_windows: int = 24
    smallest: int = 150
    largest: int = 20_000


QUICK_RECIPE = Recipe(
    hidden_size=64,
    intermediate_size=96,
    layers=2,
    length=64,
    warmup_steps=2,
    evaluations=2,
    evaluation_windows=4,
    smallest=2,
)
GPU_RECIPE = Recipe(
    hidden_size=512, intermediate_size=1280, layers=8, heads=8, length=1024, batch=32, evaluation_windows=64
)


def random_windows(tokens: np.ndarray, length: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Training windows at random places of the text ``[N]``, the same for the same ``seed``; they share its memory."""
    text = torch.from_numpy(tokens.astype(np.int64))
    starts = np.random.default_rng(seed).integers(0, len(text) - length + 1, size=count)
    return [dict.fromkeys(("input_ids", "labels"), text[start : start + length]) for start in starts]


class TimeLimit(TrainerCallback):
    """Stop when training takes three times as long as planned: the machine is slow, or got busy meanwhile."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.hit = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.deadline = time.monotonic() + 3.0 * self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.deadline:
            self.hit = control.should_training_stop = True


def build_model(recipe: Recipe) -> FoxForCausalLM:
    """A new byte-level FoX (Pro) with gates from 2 to ``8 * length`` tokens."""
    tokenizer = byte_tokenizer()
    return FoxForCausalLM(
        FoxConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=8 * recipe.length,
            decay_time_max=8 * recipe.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    corpus: Corpus, recipe: Recipe, device: str, seed: int, *, minutes: float, steps: int | None
) -> tuple[FoxForCausalLM, dict[str, Any]]:
    """Train a new model.

    Args:
        corpus: text to train on and held-out text for the loss curve.
        recipe: sizes.
        device: ``"cpu"`` or ``"cuda"``.
        seed: of the weights and the training windows.
        minutes: time to fill; the pace is measured first. Not read where ``steps`` is given.
        steps: number of optimizer steps, for a run that can be repeated exactly.

    Returns:
        The model, in evaluation mode, and facts of its training, with losses in bits per byte.
    """
    set_seed(seed)
    model = build_model(recipe).to(device)
    limit = TimeLimit(math.inf if steps is not None else 60.0 * minutes)
    if steps is None:
        steps = _steps_within(60.0 * minutes, model, recipe)
    dataset = random_windows(to_tokens(corpus.train), recipe.length, steps * recipe.batch, seed)
    rows = torch.from_numpy(windows(corpus.held_out, recipe.length, recipe.evaluation_windows))
    held_out = [{"input_ids": row, "labels": row.masked_fill(row >= SEPARATOR, IGNORED)} for row in rows]
    arguments = TrainingArguments(
        # Nothing is saved by Trainer itself; it only insists on a folder.
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        lr_scheduler_type="linear",
        warmup_steps=min(recipe.warmup_steps, steps // 4),
        max_grad_norm=1.0,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        eval_strategy="steps",
        eval_steps=max(1, steps // recipe.evaluations),
        logging_steps=max(1, steps // 12),
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        seed=seed,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=cast(Dataset, dataset),
        eval_dataset=cast(Dataset, held_out),
        optimizers=(MuonAndAdamW(model, recipe.muon_lr, recipe.adamw_lr, recipe.weight_decay), None),
        callbacks=[limit],
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    done = trainer.state.global_step
    tokens = done * recipe.batch * recipe.length
    facts = {"seconds": seconds, "steps": done, "tokens": tokens, "tokens_per_second": tokens / seconds}
    facts |= {"batch": recipe.batch, "length": recipe.length, "stopped_early": limit.hit}
    for name, key in (("train_bits_per_byte", "loss"), ("held_out_bits_per_byte", "eval_loss")):
        facts[name] = [(x["step"], x[key] / math.log(2)) for x in trainer.state.log_history if key in x]
    return model.eval(), facts


def _steps_within(seconds: float, model: FoxForCausalLM, recipe: Recipe) -> int:
    """Number of steps that fit, from the time of a few passes that change nothing."""
    tokens = torch.randint(SEPARATOR, (recipe.batch, recipe.length), device=model.device)

    def passes(count: int) -> float:
        began = time.monotonic()
        for _ in range(count):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            loss.item()
        return time.monotonic() - began

    passes(2)
    # The optimizer's step and the evaluations along the way took a fifth on top where this was measured.
    step = 1.2 * passes(5) / 5
    model.zero_grad(set_to_none=True)
    return min(max(int(seconds / step), recipe.smallest), recipe.largest)


def bits_per_byte(model: FoxForCausalLM, held_out: np.ndarray) -> float:
    """Mean cost of every byte that has a token before it, over ``[N, T]`` windows."""
    rows = torch.from_numpy(held_out)
    losses = torch.stack(list(row_losses(model, tqdm(rows, desc="scoring", unit="row"))))
    return losses[rows[:, 1:] < SEPARATOR].double().mean().item() / math.log(2)
