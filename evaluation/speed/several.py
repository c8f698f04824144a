"""`foxlm bench train --gpus N`: a training step on several GPUs of this host, beside the same step on one of them.

Each GPU gets one sequence. Every rank runs `measure_on_rank`; what it measures, in this order:

1. a shallow model of the same sizes, whose gradients on all ranks must be those that single GPUs compute;
2. steps on one GPU, by rank 0 alone while the others wait, of the model as it is and under the same layout, where a GPU
   has the memory for them;
3. steps on all;
4. what a plain model of computing and sending makes of it, for this many GPUs and for more.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from foxlm import FoxForCausalLM

from ..results import write_whole
from .bars import several_bars
from .flops import StepWork, count, datasheet_peak, matmul_rate
from .gradients import Reference, reference_gradients
from .models import set_pruning
from .observed import Shares, tiles_kept
from .processes import RECORDS, records_of
from .report import to_json
from .runner import Record, failure
from .scaling import Network, ShardedModel, StepModel
from .sharding import FSDP2, Layout, groups_of, measure_bandwidths
from .timing import interleaved, release_memory
from .train import Recipe, Variant, as_compiled, compile_regions, trainable

# More GPUs than are measured, for which steps are predicted.
PREDICTED = (8, 64)

# Layers of the model whose gradients are checked: enough that one waits for another.
_CHECKED_LAYERS = 2
# Weights, gradients and AdamW's two averages, in float32; what activations need beside them at least.
_BYTES_PER_WEIGHT, _SHARE_FOR_WEIGHTS = 16, 0.85
_AFTER_ONE = "measured on one"
_PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class SeveralRecipe:
    """What is trained on how many GPUs.

    Attributes:
        step: what is trained and how it is measured.
        gpus: ranks.
        layout: how the step is spread over them.
        host_gpus: GPUs of a host, in predictions.
        host_bandwidth: bytes per second into a host from others, in predictions.
    """

    step: Recipe
    gpus: int
    layout: Layout = FSDP2
    host_gpus: int = 8
    host_bandwidth: float = 400e9


def run_several(recipe: SeveralRecipe) -> Record:
    """Check and time training steps, in a process for each GPU.

    Returns:
        What `Workload.facts` has; ``gpus``, ``layout``, ``checkpointing``, ``tokens``, ``parameters``, ``sizes``;
        ``matmul_flops`` and ``bandwidths``, measured; ``steps``, a record for each variant on one GPU and on all, with
        its ``worst_gradient``, ``step``, ``tokens_per_second``, ``mfu``, ``peak_bytes``; ``scaling``, see
        `predictions`; ``bars``. If a process fails later, or on Ctrl-C, what was measured before, with an ``error``
        and its ``detail``.

    Raises:
        RankError: a process failed before anything was measured.
    """
    return records_of(measure_on_rank, recipe.gpus, recipe.step.device, recipe)


def measure_on_rank(rank: int, recipe: SeveralRecipe, folder: str) -> None:
    """Measure with all other ranks; rank 0 leaves its records in ``folder``, after each part."""
    bench = _Bench(rank, recipe, Path(folder))
    shallow = bench.describe()
    reference = bench.reference(shallow)
    recipe.layout.distribute(shallow, bench.mesh)
    bench.check(shallow, reference)
    del shallow, reference
    release_memory(recipe.step.device)
    if bench.admitted():
        bench.on_one()
        bench.on_all()
    if rank == 0:
        bench.predict()


class _Bench:
    """One rank's part of the measurement."""

    def __init__(self, rank: int, recipe: SeveralRecipe, folder: Path) -> None:
        self._rank, self._recipe, self._folder = rank, recipe, folder
        self._step = recipe.step
        device, ranks = self._step.device, recipe.gpus
        meshes = init_device_mesh(device, (ranks, 1), mesh_dim_names=("all", "one"))
        self.mesh, self._one = meshes["all"], meshes["one"]
        self._store = dist.FileStore(str(folder / "turns"), ranks)
        self._peak = datasheet_peak(device)
        self.records: Record = {}

    # ---- The parts

    def describe(self) -> FoxForCausalLM:
        """Facts of the model and the machine.

        Returns:
            The model with only its first layers.
        """
        step = self._step
        model = trainable(step)
        self._variants = step.variants(model.config)
        self._ids = step.workload.ids(model.config.vocab_size, self._recipe.gpus, step.tokens)
        self._own = self._recipe.layout.own(self._rank, self._ids)
        self._work = StepWork.of(model, step.tokens, step.checkpointing)
        self._groups = groups_of(model)
        with torch.autocast(step.device, torch.bfloat16):
            self._kept = self._mean_shares(tiles_kept(model, self._own))
        parameters = count(model)
        config = model.config
        _cut(model, _CHECKED_LAYERS)
        release_memory(step.device)
        self._say("measuring how fast the GPUs compute and send")
        self._bandwidths = measure_bandwidths(self._groups, self.mesh)
        self.records = step.workload.facts() | {
            "gpus": self._recipe.gpus,
            "layout": self._recipe.layout.name,
            "checkpointing": step.checkpointing,
            "parameters": parameters,
            "sizes": {name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim")}
            | {"num_hidden_layers": self._work.layers, "intermediate_size": config.intermediate_size},
            "tokens": step.tokens,
            "model_flops": self._work.model(),
            "datasheet_flops": self._peak,
            "matmul_flops": self._of_all(matmul_rate(step.device)),
            "bandwidths": self._bandwidths,
            "checked_layers": len(model.model.layers),
            "steps": [],
        }
        self._save()
        return model

    def reference(self, shallow: FoxForCausalLM) -> Reference:
        """What single GPUs make of the sequences, each of one of them."""
        self._say("checking gradients")
        return reference_gradients(shallow, self._own, self.mesh)

    def check(self, shallow: FoxForCausalLM, reference: Reference) -> None:
        """Hold the gradients of every variant on all ranks to those of single ones."""
        if any(one.compiled for one in self._variants):
            compile_regions(shallow)
        for variant in self._variants:
            record = self._new_record(variant, self._recipe.layout.name, self._recipe.gpus)
            set_pruning(shallow, variant.rule)
            self._backward(shallow, variant, autocast=False)
            # All ranks have compared the same whole gradients; whatever one says of them holds for all.
            found = self._gathered(reference.compare(shallow, variant.rule))
            record |= next((one for one in found if one.get("status") == "wrong"), found[0])
            self._save()

    def on_one(self) -> None:
        """Steps on one GPU, the other ranks waiting."""
        needed = _BYTES_PER_WEIGHT * self.records["parameters"]
        if self._step.device == "cuda":
            memory = torch.cuda.get_device_properties(self._rank).total_memory
            if needed > _SHARE_FOR_WEIGHTS * memory:
                fault = f"weights, gradients and AdamW need {needed / 1e9:.0f} GB, a GPU has {memory / 1e9:.0f}"
                self.records["one_gpu"] = {"status": "missing", "reason": fault}
                return
        self.records["one_gpu"] = {"status": "measured"}
        if self._rank == 0:
            for name, mesh in (("one GPU", None), (f"{self._recipe.layout.name} on one GPU", self._one)):
                self._say(f"measuring {name}")
                try:
                    self._measure(name, 1, mesh)
                except Exception as error:
                    # Of any kind, for example too little memory: the steps on all are measured nevertheless.
                    self.records["one_gpu"] = failure(error)
                release_memory(self._step.device)
            self._store.set(_AFTER_ONE, "")
        else:
            # In no collective, whose waiting would keep a GPU busy.
            self._store.wait([_AFTER_ONE], _PATIENCE)
        dist.barrier()

    def on_all(self) -> None:
        """Steps on all GPUs."""
        self._say(f"measuring {self._recipe.gpus} GPUs")
        self._measure(self._recipe.layout.name, self._recipe.gpus, self.mesh)

    def predict(self) -> None:
        """Bars, and what the scaling model says."""
        records = self.records
        network = Network(
            self._bandwidths["all_gather"],
            self._bandwidths["reduce_scatter"],
            self._recipe.host_gpus,
            self._recipe.host_bandwidth,
        )
        found = (predictions(records["steps"], one, self._groups, network) for one in self._variants)
        records["scaling"] = [one for one in found if one is not None]
        records["bars"] = several_bars(records)
        self._save()

    # ---- What they are made of

    def _measure(self, layout: str, gpus: int, mesh: DeviceMesh | None) -> None:
        """Steps of all variants found right; of the model as it is under autocast without a mesh."""
        model = trainable(self._step)
        if mesh is not None:
            self._recipe.layout.distribute(model, mesh)
        if any(one.compiled for one in self._variants):
            compile_regions(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def run(variant: Variant) -> Tensor:
            set_pruning(model, variant.rule)
            loss = self._backward(model, variant, autocast=mesh is None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        steps: dict[Variant, Callable[[], object]] = {}
        records: dict[Variant, Record] = {}
        for variant in self.admitted():
            record = records[variant] = self._new_record(variant, layout, gpus)
            # The first one compiles, and makes the optimizer's state.
            record["loss"] = run(variant).item()
            record |= self._peak_memory(partial(run, variant), gpus)
            steps[variant] = partial(run, variant)
            self._save()
        timings = interleaved(steps, self._step.rounds, self._step.device)
        optimizer_ms = self._optimizer_ms(model, optimizer, mesh is None)
        for variant, timing in timings.items():
            ms = self._of_all(timing.ms, largest=True) if gpus > 1 else timing.ms
            record = records[variant]
            record |= {"status": "measured", "step": asdict(replace(timing, ms=ms)), "optimizer_ms": optimizer_ms}
            record |= {"tokens_per_second": 1e3 * gpus * self._step.tokens / ms}
            record |= self._work.rates(self._kept[variant.rule], ms / 1e3, self._peak)
        self._save()

    def _backward(self, model: FoxForCausalLM, variant: Variant, autocast: bool) -> Tensor:
        with as_compiled(variant.compiled):
            with torch.autocast(self._step.device, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=self._own, labels=self._own, use_cache=False).loss
            loss.backward()
        return loss.detach()

    def _optimizer_ms(self, model: FoxForCausalLM, optimizer: torch.optim.Optimizer, autocast: bool) -> float:
        """Of the optimizer's part of a step, which is alike in all variants."""
        self._backward(model, self.admitted()[-1], autocast)
        ms = interleaved({"optimizer": optimizer.step}, self._step.rounds, self._step.device)["optimizer"].ms
        optimizer.zero_grad(set_to_none=True)
        return ms

    def _peak_memory(self, call: Callable[[], object], gpus: int) -> Record:
        """Most bytes that tensors take on a GPU in ``call``, and that the allocator has taken for them."""
        if self._step.device != "cuda":
            call()
            return {"peak_bytes": None, "reserved_bytes": None}
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        most = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
        return {name: self._of_all(x, largest=True) for name, x in most.items()} if gpus > 1 else most

    def _new_record(self, variant: Variant, layout: str, gpus: int) -> Record:
        """The record of a variant, made where there is none."""
        for record in self.records["steps"]:
            if (record["name"], record["layout"]) == (variant.name, layout):
                return record
        record = {"name": variant.name, "rule": variant.rule, "compiled": variant.compiled, "layout": layout}
        record |= {"gpus": gpus, "tiles_kept": self._kept[variant.rule], "status": "unfinished"}
        record |= {"reason": "the run ended before"}
        self.records["steps"].append(record)
        return record

    def admitted(self) -> list[Variant]:
        """Those whose gradients are right."""
        wrong = {one["name"] for one in self.records["steps"] if one["status"] == "wrong"}
        return [one for one in self._variants if one.name not in wrong]

    def _mean_shares(self, own: Shares) -> Shares:
        shares = self._gathered(own)
        return {rule: sum(one[rule] for one in shares) / len(shares) for rule in own}

    def _of_all(self, own: float, largest: bool = False) -> float:
        """The smallest of all ranks' figures, or the largest."""
        return (max if largest else min)(self._gathered(own))

    def _gathered(self, own: Any) -> list[Any]:
        everyone: list[Any] = [None] * self._recipe.gpus
        dist.all_gather_object(everyone, own)
        return everyone

    def _say(self, text: str) -> None:
        if self._rank == 0:
            typer.echo(text, err=True)

    def _save(self) -> None:
        """Rank 0 leaves what is known so far: what stops a run leaves what was measured before."""
        if self._rank == 0:
            write_whole(self._folder / RECORDS, to_json(self.records))


def _cut(model: FoxForCausalLM, layers: int) -> None:
    """Leave only the first ``layers`` of a model."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)


def predictions(
    steps: Iterable[Mapping[str, Any]], variant: Variant, groups: ShardedModel, network: Network
) -> Record | None:
    """What the scaling model says of a variant: for as many GPUs as were measured, and for more.

    Returns:
        ``name``, ``model`` (what it was worked out from) and ``predictions``, the first of them with ``measured_ms``
        and ``error``, by how much of that it is too long; None where the variant was not measured.
    """
    timed = {one["layout"]: one for one in steps if one["name"] == variant.name and "step" in one}
    everyone = next((one for one in timed.values() if one["gpus"] > 1), None)
    if everyone is None:
        return None
    gpus, measured = everyone["gpus"], everyone["step"]["ms"] / 1e3
    tokens = round(everyone["tokens_per_second"] * measured / gpus)
    alone = timed.get(f"{everyone['layout']} on one GPU")
    if alone is not None:
        optimizer = alone["optimizer_ms"] / 1e3
        known = StepModel(alone["step"]["ms"] / 1e3 - optimizer, optimizer, tokens, groups, network)
    else:
        known = StepModel.calibrated(measured, everyone["optimizer_ms"] / 1e3, gpus, tokens, groups, network)
    first = known.predict(gpus)
    first |= {"measured_ms": 1e3 * measured, "error": first["step_ms"] / (1e3 * measured) - 1.0}
    others = [known.predict(n) for n in PREDICTED if n > gpus]
    return {"name": variant.name, "model": known.facts(), "predictions": [first, *others]}
