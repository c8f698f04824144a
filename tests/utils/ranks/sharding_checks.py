"""What the tests of sharding run on each rank: training by Trainer on each engine, and sharded loading."""

import os
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from foxlm import FoxForCausalLM
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.modeling.parallel.fsdp import FoxParallelismConfig, prepare_fsdp2
from foxlm.training import FoxTrainer
from fsdp_on_cpu import accelerate_shards
from models import tiny_model, tokens

STEPS = 10
BATCH = 8


@dataclass
class Case:
    """One training: what is not said is float32 FSDP2 of a whole tiny Pro model."""

    engine: str = "fsdp"  # or ddp
    groups: tuple[int, int] | None = None  # replicas and shards of each
    context: int = 1  # ranks that share each sequence
    dtype: torch.dtype = torch.float32
    prepare: bool = True
    resume: str | None = None
    fsdp: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    engine: str
    gate_weight: str
    gate_bias: list[float]
    gate_logits: str
    skipped_shares: list[float] = field(default_factory=list)
    tokens: float = 0.0


class RaggedRows(Dataset):
    """Rows of 1 to 28 random tokens, so that ranks see different numbers of them."""

    def __init__(self) -> None:
        lengths = torch.randint(1, 29, (BATCH * STEPS,), generator=torch.Generator().manual_seed(1))
        self.rows = [tokens(int(length), seed=index).tolist() for index, length in enumerate(lengths)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index]}


def make_model(case: Case) -> FoxForCausalLM:
    model = tiny_model("pro", dtype=torch.float32, **case.model).to(case.dtype).train()
    for layer in model.model.layers:
        # As `from_pretrained(dtype=...)` keeps them.
        layer.self_attn.forget_gate.float()
    return model


def make_trainer(case: Case, out: str) -> Trainer:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    engine: dict[str, Any] = {}
    if case.engine != "ddp":
        engine = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"} | case.fsdp}
    if case.groups:
        engine["parallelism_config"] = ParallelismConfig(dp_replicate_size=case.groups[0], dp_shard_size=case.groups[1])
    if case.context > 1:
        engine["parallelism_config"] = FoxParallelismConfig(cp_size=case.context, dp_shard_size=world // case.context)
    rows = BATCH * case.context // world
    options: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": rows, "learning_rate": 3e-3}
    options |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    trainer = FoxTrainer(
        make_model(case),
        TrainingArguments(out, **(options | engine | case.arguments)),
        train_dataset=RaggedRows(),
        data_collator=DataCollatorWithFlattening(),
    )
    if case.prepare:
        prepare_fsdp2(trainer.accelerator, trainer.model)
    if case.context > 1:
        trainer.model.set_context_parallel(ContextParallel(trainer.accelerator.torch_device_mesh["cp"]))
    return trainer


def train(case: Case, out: str) -> Trained:
    trainer = make_trainer(case, out)
    seen: list[tuple[str, list[float], str]] = []

    def look(module, inputs, output) -> None:
        if not seen:
            seen.append((str(module.weight.dtype), module.bias.tolist(), str(output.dtype)))

    handle = trainer.model.model.layers[0].self_attn.forget_gate.register_forward_hook(look)
    trainer.train(resume_from_checkpoint=case.resume)
    handle.remove()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    engine = trainer.accelerator.distributed_type.value
    shares = [x["skipped_share"] for x in history if "skipped_share" in x]
    last = trainer.state.log_history[-1]
    tokens_seen = last["train_tokens_per_second"] * last["train_runtime"]
    norms = [x["grad_norm"] for x in history]
    return Trained([x["loss"] for x in history], norms, engine, *seen[0], shares, tokens_seen)


def train_all(cases: dict[str, Case], out: str) -> dict[str, Trained | str]:
    """Each case by name, or the traceback of what it raised."""
    results: dict[str, Trained | str] = {}
    for name, case in cases.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        try:
            with accelerate_shards() if case.engine == "fsdp" else nullcontext():
                results[name] = train(case, str(Path(out) / name))
        except Exception:
            results[name] = traceback.format_exc()
    return results


def load_sharded(folder: str, dtype: torch.dtype) -> dict[str, Any]:
    """`from_pretrained` with transformers' own sharding: loss, gradients as whole tensors, what is sharded, a text."""
    config = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
    model = FoxForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config).train()
    rows = tokens(2, 24)
    loss = model(rows, labels=rows).loss
    loss.backward()
    gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    with torch.no_grad():
        model.eval()
        texts = []
        for frees in (False, True):
            model.config.free_dead_cache = frees
            texts.append(model.generate(tokens(1, 150), max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist())
    groups = sum(isinstance(module, FSDPModule) for module in model.modules())
    return {"loss": loss.item(), "gradients": gradients, "texts": texts, "groups": groups}


def work(cases: dict[str, Case], out: str, loads: Sequence[tuple[str, torch.dtype]] = ()) -> tuple[dict, list]:
    """All that one run of processes is to do."""
    loaded = [load_sharded(*each) for each in loads]
    return train_all(cases, out), loaded
