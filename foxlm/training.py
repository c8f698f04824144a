"""transformers' Trainer, with what is worth watching while a FoX model trains: tokens per second and what is pruned.

And what finetunes a graft: distillation from the model that it was made of, and a schedule that raises the share of
attention that is skipped.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from foxlm.evaluation.skipped_share import skipped_share
from foxlm.kernels.argument_types import typed


class FoxTrainer(Trainer):
    """`Trainer` that logs two numbers more beside each ``loss``, wherever it logs: console, TensorBoard, log_history.

    ``tokens_per_second``: of all processes since the last time, without padding and without the time of evaluation.
    Trainer's own counter (`include_num_input_tokens_seen`) gathers and waits for the device at every micro-batch, has
    the mean since training began, and counts sequences that ranks share once for each; this one waits when it logs.

    ``skipped_share``: share of attention's tiles that pruning skips on the last micro-batch, mean over processes; left
    out where `skipped_share` is None, as with ``acp_eps=None``, and with DeepSpeed. It costs a forward pass of that
    batch each time that something is logged (`logging_steps`).

    At the end ``train_tokens_per_second`` stands in place of ``train_samples_per_second``, which says little of packed
    rows. Before another trainer, as in ``class Mine(FoxTrainer, SFTTrainer)``, it adds the same to that one.
    """

    _tokens: int | Tensor = 0
    _tokens_of_run: int = 0
    _since: float = 0.0
    _batch: Mapping[str, Any] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._tokens, self._tokens_of_run, self._batch = 0, 0, None
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # Some trainers pass rows here that their loss makes a batch of.
        if isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), Tensor):
            if self._batch is None:
                self._since = time.perf_counter()
            tokens: Tensor = inputs["input_ids"]
            mask: Any = inputs.get("attention_mask")
            padded = isinstance(mask, Tensor) and mask.shape == tokens.shape
            # Of a mask on its device: nothing waits for it before it is logged.
            self._tokens = self._tokens + (torch.count_nonzero(mask) if padded else tokens.numel())
            # A copy: losses take labels out of it.
            self._batch = dict(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        began = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._since += time.perf_counter() - began
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        ends = "train_runtime" in logs
        if self._batch is not None and ("loss" in logs or ends):
            tokens = self._count_tokens()
            if ends:
                logs.pop("train_samples_per_second", None)
                logs["train_tokens_per_second"] = round(self._tokens_of_run / logs["train_runtime"], 1)
                self._batch = None
            else:
                logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self._since), 1)
                # DeepSpeed's parameters are whole only where its own engine runs the model.
                share = (
                    None
                    if self.is_deepspeed_enabled
                    else skipped_share(self.model, self._prepare_inputs(dict(self._batch)))
                )
                if share is not None:
                    logs["skipped_share"] = self.accelerator.reduce(share.float(), reduction="mean").item()
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _count_tokens(self) -> int:
        """Tokens of all processes since the last time."""
        tokens = torch.as_tensor(self._tokens, dtype=torch.int64, device=self.args.device)
        same = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        counted = int(self.accelerator.reduce(tokens, reduction="sum").item()) // same
        self._tokens, self._tokens_of_run = 0, self._tokens_of_run + counted
        return counted


# Tokens whose log-probabilities are held at a time, in float32.
_TOKENS_OF_A_CHUNK = 1024


@typed
def distance(logits: Tensor, expected: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over tokens of the Kullback-Leibler divergence ``KL(softmax(expected) || softmax(logits))``, in float32.

    Hinton et al. (arXiv 1503.02531), at temperature 1. Backward computes a chunk of tokens again at a time: the
    log-probabilities of 8,192 tokens of a vocabulary of 50,000 take 1.6 GB.

    Args:
        logits: ``[B, T, vocab]``, of the model that learns.
        expected: the same of its teacher, without gradients.
        real: ``[B, T]`` bool, False for tokens that do not count, or None.

    Returns:
        A scalar in nats; 0 if no token counts.

    Raises:
        ValueError: shapes differ, as those of models with other vocabularies.
    """
    if logits.ndim < 2 or expected.shape != logits.shape:
        raise ValueError(
            f"expected must have the shape of logits, [B, T, vocab] = {list(logits.shape)}, got {list(expected.shape)}"
        )
    if real is not None and (real.shape != logits.shape[:-1] or real.dtype != torch.bool):
        raise ValueError(
            f"real must be bool of shape {list(logits.shape[:-1])}, got {real.dtype} of shape {list(real.shape)}"
        )

    def part(logits: Tensor, expected: Tensor) -> Tensor:
        ours, theirs = (x.float().log_softmax(-1) for x in (logits, expected))
        return nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)

    logits, expected = logits.flatten(0, -2), expected.flatten(0, -2)
    if real is not None:
        logits, expected = logits[real.flatten()], expected[real.flatten()]
    chunks = zip(logits.split(_TOKENS_OF_A_CHUNK), expected.split(_TOKENS_OF_A_CHUNK), strict=True)
    sums = [checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum() / max(1, len(logits))


class DistillingTrainer(FoxTrainer):
    """`FoxTrainer` whose loss is the `distance` to a teacher, plus the model's own forget-gate regularisation.

    For a graft: its gates learn to leave the model as it was, whatever text they are trained on, where a language-model
    loss also teaches the text.

    Args:
        teacher: of the same vocabulary; ``graft(base, forget_gate="none")`` is the base on foxlm's kernels. It is put
            in evaluation mode and on the device of the training, and is not trained.
        args, kwargs: as for `Trainer`.

    Raises:
        ValueError: vocabularies differ, or the model's logits are never whole (``loss_chunk_size``).
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        # Before Trainer, which takes memory. A model in a wrapper, as PEFT's, has its configuration.
        if not (isinstance(teacher, nn.Module) and hasattr(teacher, "config")):
            raise ValueError(f"teacher must be a model, such as from_pretrained gives, got {teacher!r}")
        super().__init__(*args, **kwargs)
        config: Any = self.model.config
        its: Any = teacher.config
        if its.vocab_size != config.vocab_size:
            raise ValueError(
                f"teacher must have the vocabulary of the model, {config.vocab_size} tokens, got {its.vocab_size}"
            )
        if getattr(config, "loss_chunk_size", None) is not None:
            raise ValueError(f"loss_chunk_size must be None to be distilled, got {config.loss_chunk_size}")
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        # So that a loss is divided by the number of micro-batches: this one is a mean over tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = {name: x for name, x in inputs.items() if name not in ("labels", "use_cache")} | {"use_cache": False}
        with torch.no_grad():
            expected = self.teacher(**inputs).logits
        # Without targets the model's own loss is the regularisation of its gates alone.
        outputs = model(**inputs, labels=torch.full(expected.shape[:2], -100, device=expected.device))
        mask = inputs.get("attention_mask")
        loss = outputs.loss + distance(outputs.logits, expected, None if mask is None else mask.bool())
        return (loss, outputs) if return_outputs else loss


class SkippedShareRamp(TrainerCallback, ExportableState):
    """Raises the share of attention that pruning skips to a goal, by the weight of the forget-gate regularisation.

    Each time that a `FoxTrainer` logs ``skipped_share``, the weight (`FoxConfig.forget_aux_loss_coef`) grows by as much
    as the share is below what is wanted by then, and falls likewise; it is logged as ``forget_aux_loss_coef``. What is
    wanted rises evenly from the first share that was logged to the goal. A model that is compiled as a whole compiles
    again at each change; layers that are compiled do not.

    Args:
        goal: share to skip, in (0, 1), by the model's ``acp_eps`` and ``acp_rule``.
        steps: of training, until the goal is wanted.
        coefficient: the first weight, above 0.
        gain: by which factor the weight grows, ``exp(gain * missing share)``, at each log.

    Raises:
        ValueError: an argument is not as above.
    """

    @typed
    def __init__(self, goal: float, steps: float, coefficient: float = 0.01, gain: float = 5.0) -> None:
        if not 0.0 < goal < 1.0:
            raise ValueError(f"goal must be a share in (0, 1), got {goal}")
        for name, value in (("steps", steps), ("coefficient", coefficient), ("gain", gain)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.goal, self.steps, self.gain = goal, steps, gain
        self.coefficient = coefficient
        self.first_share: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.forget_aux_loss_coef = self.coefficient

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "skipped_share" not in logs:
            return
        share = logs["skipped_share"]
        self.first_share = share if self.first_share is None else self.first_share
        progress = min(1.0, state.global_step / self.steps)
        wanted = self.first_share + progress * (self.goal - self.first_share)
        self.coefficient *= math.exp(self.gain * (wanted - share))
        kwargs["model"].config.forget_aux_loss_coef = self.coefficient
        # The first is what other callbacks see, the second what is kept.
        for log in (logs, state.log_history[-1]):
            log["forget_aux_loss_coef"] = self.coefficient

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: with ``restore_callback_states_from_checkpoint`` Trainer goes on from it."""
        arguments = {"goal": self.goal, "steps": self.steps, "gain": self.gain}
        return {"args": arguments, "attributes": {"coefficient": self.coefficient, "first_share": self.first_share}}
