"""transformers' Trainer, with what is worth watching while a FoX model trains: tokens per second and what is pruned."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from foxlm.evaluation.skipped_share import skipped_share


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
