"""`foxlm bench train --gpus N`: what it counts, predicts and measures, and what becomes of a rank that fails."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import speed_ranks
from foxlm import FoxForCausalLM
from foxlm.cli.bench import app
from foxlm.evaluation.speed import tables
from foxlm.evaluation.speed.bars import several_bars
from foxlm.evaluation.speed.flops import StepWork
from foxlm.evaluation.speed.models import CPU_SIZES, build_fox
from foxlm.evaluation.speed.processes import RankError, run_ranks
from foxlm.evaluation.speed.scaling import Network, ShardedModel, StepModel, Transfer, step_seconds
from foxlm.evaluation.speed.several import SeveralRecipe, predictions, run_several
from foxlm.evaluation.speed.sharding import fully_sharded, groups_of
from foxlm.evaluation.speed.train import Recipe, Variant, compile_regions, trainable
from foxlm.evaluation.speed.workload import Workload

SIZES = tuple(CPU_SIZES.items())
NETWORK = Network(all_gather=100.0, reduce_scatter=50.0, host_gpus=4, host_bandwidth=200.0)
GROUPS = ShardedModel(layers=3, layer=10, embedding=20, head=22)


# The scaling model


def test_a_step_takes_the_longer_of_computing_and_sending_and_what_nothing_hides() -> None:
    hidden, exposed = Transfer("a", 100.0, 10.0, True), Transfer("b", 6.0, 2.0, False)
    assert step_seconds(12.0, [hidden, exposed]) == 12.0 + 3.0
    assert step_seconds(4.0, [hidden, exposed, hidden]) == 20.0 + 3.0
    assert step_seconds(4.0, []) == 4.0


def test_bandwidth_between_hosts_by_hand() -> None:
    # Within a host of 4 what was measured; 8 GPUs receive 7/8 each, and half of it enters each of 2 hosts.
    assert NETWORK.effective(100.0, 4) == pytest.approx(100.0)
    assert NETWORK.hosts(8) == 2
    assert NETWORK.effective(100.0, 8) == pytest.approx(100.0)
    slow = replace(NETWORK, host_bandwidth=10.0)
    assert slow.effective(100.0, 8) == pytest.approx((7 / 8) / (0.5 / 10.0))
    assert slow.effective(100.0, 4) == pytest.approx(100.0)


def test_bytes_of_a_step_by_hand() -> None:
    transfers = {one.name: one for one in GROUPS.transfers(NETWORK, 2)}
    # 3 layers and the embedding twice, the head once, all of 2 bytes, half of which is there already.
    gathered = transfers["gather the first weights"].bytes + transfers["gather the other weights"].bytes
    assert gathered == 0.5 * 2 * (2 * 30 + 2 * 20 + 22)
    assert transfers["gather the first weights"].bytes == 0.5 * 2 * (20 + 10)
    scattered = transfers["scatter gradients"].bytes + transfers["scatter the last gradients"].bytes
    assert scattered == 0.5 * 4 * (30 + 20 + 22)
    assert [one.overlappable for one in transfers.values()] == [False, True, True, False]
    assert sum(one.bytes for one in GROUPS.transfers(NETWORK, 64)) == pytest.approx(
        2 * 63 / 64 * (gathered + scattered)
    )


def test_groups_are_all_parameters() -> None:
    model = build_fox("pro-760m", SIZES, "cpu")
    groups = groups_of(model)
    assert groups.layers * groups.layer + groups.embedding + groups.head == sum(x.numel() for x in model.parameters())
    assert (groups.layers, groups.embedding) == (2, 256 * 64)


def test_predictions_are_perfect_without_sending_and_not_on_a_slow_network() -> None:
    fast = Network(1e12, 1e12, host_bandwidth=1e12)
    model = StepModel(2.0, 0.5, 1000, GROUPS, fast)
    for gpus in (1, 2, 8, 64):
        step = model.predict(gpus)
        assert step["step_ms"] == pytest.approx(1e3 * (2.0 + 0.5 / gpus))
        assert step["tokens_per_second"] == pytest.approx(gpus * 1000 / (2.0 + 0.5 / gpus))
        assert step["waits_for"] == "compute"
    slow = replace(model, network=Network(1e12, 1e12, host_bandwidth=1.0))
    assert slow.predict(8) == model.predict(8)
    assert slow.predict(64)["waits_for"] == "network" and slow.predict(64)["efficiency"] < 0.02


def test_a_calibrated_model_gives_back_its_step() -> None:
    model = StepModel.calibrated(3.0, 0.25, 2, 1000, GROUPS, Network(1e3, 1e3))
    assert (model.predict(2)["step_ms"], model.calibrated_on) == (pytest.approx(3e3), 2)
    assert model.optimizer == 0.5


def timed(name: str, layout: str, gpus: int, ms: float) -> dict:
    rate = 1e3 * gpus * 16384 / ms
    record = {"name": name, "rule": "tight", "compiled": True, "layout": layout, "gpus": gpus, "status": "measured"}
    return record | {"step": {"ms": ms}, "optimizer_ms": 10.0, "tokens_per_second": rate, "mfu": 0.3, "tiles_kept": 0.2}


def test_predictions_stand_beside_what_was_measured() -> None:
    variant = Variant("tight", True)
    steps = [timed(variant.name, "one GPU", 1, 120.0), timed(variant.name, "FSDP2 on one GPU", 1, 100.0)]
    assert predictions(steps, variant, GROUPS, Network(1e12, 1e12)) is None
    steps.append(timed(variant.name, "FSDP2", 2, 110.0))
    found = predictions(steps, variant, GROUPS, Network(1e12, 1e12))
    assert found is not None
    first = found["predictions"][0]
    # 90 ms of computing, half of 10 of the optimizer.
    assert first["step_ms"] == pytest.approx(95.0) and first["error"] == pytest.approx(95.0 / 110.0 - 1.0)
    assert [one["gpus"] for one in found["predictions"]] == [2, 8, 64]
    assert found["model"]["tokens"] == 16384 and found["model"]["calibrated_on"] is None
    found = predictions(steps[2:], variant, GROUPS, Network(1e12, 1e12))
    assert found is not None and found["model"]["calibrated_on"] == 2 and abs(found["predictions"][0]["error"]) < 1e-9


def test_bars_are_over_the_faster_of_the_steps_on_one_gpu() -> None:
    sizes = {"hidden_size": 1536, "num_hidden_layers": 24}
    steps = [timed("x", "one GPU", 1, 120.0), timed("x", "FSDP2 on one GPU", 1, 100.0), timed("x", "FSDP2", 2, 110.0)]
    results = {"preset": "pro-760m", "sizes": sizes, "tokens": 16384, "gpus": 2, "checkpointing": False, "steps": steps}
    bars = several_bars(results)
    assert bars["scaling_efficiency"] == {"x": {"value": pytest.approx(100.0 / 110.0), "at_least": 0.9}}
    assert bars["mfu"] == {"x": {"value": 0.3}}
    assert several_bars(results | {"tokens": 4096})["scaling_efficiency"]["x"] == {
        "value": pytest.approx(100.0 / 110.0)
    }
    large = {"hidden_size": 4096, "num_hidden_layers": 32}
    bars = several_bars(results | {"sizes": large, "tokens": 32768, "checkpointing": True, "steps": steps[2:]})
    assert bars == {"mfu": {"x": {"value": 0.3, "at_least": 0.45}}}


# What is counted


def test_operations_are_those_that_torch_counts() -> None:
    model = build_fox("pro-760m", SIZES, "cpu").train()
    model.set_attn_implementation("eager")
    tokens = 64
    ids = torch.randint(256, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    work = StepWork.of(model, tokens, checkpointing=False)
    norms = sum(x.numel() for x in model.parameters() if x.ndim == 1)
    # Eager attention computes the half that causality forbids, too; norms and biases are in no product.
    attention = work.model(1.0) - work.model(0.0)
    assert attention == 12 * 2 * 64 * tokens**2 / 2
    assert counter.get_total_flops() == work.model() - 6 * norms * tokens + attention
    assert work.done(1.0) == pytest.approx(work.model() + attention / 6)
    again = replace(work, checkpointing=True).done(0.5) - work.done(0.5)
    assert again == 2 * work.layer_weights * tokens + 0.5 * attention / 3
    rates = work.rates(0.5, 2.0, 1e9)
    assert rates["mfu"] == work.model() / 2e9 and rates["mfu_kept"] == (work.model() - 0.5 * attention) / 2e9
    assert work.rates(0.5, 2.0, None)["mfu"] is None


# Sharding


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def kept_for_backward(model: FoxForCausalLM, ids: Tensor) -> int:
    """Numbers that the layers' forward passes keep."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(x.numel() for x in {id(x): x for x in kept}.values() if x.data_ptr() not in own)


def test_layers_stay_checkpointed_and_whole_when_sharded_and_compiled(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    ids = torch.randint(256, (1, 128))
    kept = {}
    for checkpointing in (False, True):
        step = Recipe(Workload("cpu", "pro-760m", SIZES), checkpointing=checkpointing)
        model = trainable(step)
        fully_sharded(model, mesh)
        gate = model.get_parameter("model.layers.0.self_attn.forget_gate.weight")
        compile_regions(model)
        kept[checkpointing] = kept_for_backward(model, ids)
        assert gate.grad is not None and gate.grad.dtype == torch.float32
    # Of one layer about 40 times its input is kept, of a checkpointed one the input.
    assert kept[True] < kept[False] / 3
    assert not counters["graph_break"], counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


# Processes


def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 of 2: ValueError: the second one will not$") as caught:
        run_ranks(speed_ranks.raise_on_one, 2, "cpu", tmp_path, str(tmp_path))
    assert "and says why" in caught.value.detail
    assert time.monotonic() - began < 300
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)


def recipe(**changes) -> SeveralRecipe:
    step = Recipe(Workload("cpu", "pro-760m", SIZES), tokens=256, rounds=1, only=("tight",))
    return replace(SeveralRecipe(step, 2), **changes)


def test_a_rank_that_is_killed_ends_the_run_with_what_was_measured() -> None:
    began = time.monotonic()
    results = run_several(recipe(layout=speed_ranks.KILLED))
    assert time.monotonic() - began < 300
    assert results["error"] == "rank 1 of 2 was ended by SIGKILL"
    assert results["bandwidths"]["all_gather"] > 0.0 and results["steps"] == []


def test_control_a_lost_part_of_a_weight_is_found_and_not_timed() -> None:
    results = run_several(recipe(layout=speed_ranks.LOSING))
    assert "error" not in results, results["detail"]
    (step,) = results["steps"]
    assert step["status"] == "wrong" and "step" not in step
    assert step["reason"].startswith("gradient of model.layers.1.mlp.")
    assert results["scaling"] == [] and results["bars"] == {}


# The command


@pytest.mark.slow
def test_training_on_two_ranks_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ["train", "--gpus", "2", "--device", "cpu", "--rounds", "1", "--tokens", "384", "--checkpointing"]
    arguments += [
        "--hidden-size",
        "32",
        "--layers",
        "3",
        "--only",
        "tight",
        "--host-bandwidth",
        "50",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert results == json.loads(result.stdout)
    assert (results["kind"], results["gpus"], results["checked_layers"]) == ("train", 2, 2)
    assert results["sizes"]["hidden_size"] == 32 and results["changed"]["num_hidden_layers"] == 3
    by_layout = {one["layout"]: one for one in results["steps"]}
    assert set(by_layout) == {"one GPU", "FSDP2 on one GPU", "FSDP2"}
    for one in by_layout.values():
        assert one["status"] == "measured" and one["tiles_kept"] < 1.0
        assert one["tokens_per_second"] == pytest.approx(1e3 * one["gpus"] * 384 / one["step"]["ms"])
        assert one["loss"] == pytest.approx(5.5, abs=0.3)
    everyone = by_layout["FSDP2"]
    assert 0.0 < everyone["worst_gradient"]["error"] <= everyone["worst_gradient"]["limit"] < 0.2
    (scaling,) = results["scaling"]
    assert scaling["model"]["network"]["host_bandwidth"] == 50e9
    assert [one["gpus"] for one in scaling["predictions"]] == [2, 8, 64]
    drawn = tables.render(results)
    assert "Figures of no use" in drawn and "| foxlm, ACP tight | FSDP2 on 2 GPUs |" in drawn
    assert "| foxlm, ACP tight | 64 | 8 |" in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus must be a positive integer, got 0"),
        (["--gpus", "9"], "--gpus must be at most 8 processes with --device cpu, got 9"),
        (["--gpus", "2", "--host-gpus", "0"], "--host-gpus must be a positive integer, got 0"),
        (["--gpus", "2", "--host-bandwidth", "0"], "--host-bandwidth must be a positive number of GB/s, got 0.0"),
        (["--gpus", "2", "--host-bandwidth", "nan"], "--host-bandwidth must be a positive number of GB/s, got nan"),
        (["--gpus", "2", "--heads", "7"], "hidden_size must be a multiple of num_attention_heads"),
        (["--gpus", "2", "--hidden-size", "-64"], "--hidden-size must be a positive integer, got -64"),
        (["--gpus", "2", "--only", "compiled"], "--only must be part of one of ['foxlm', 'foxlm, ACP paper',"),
        (["--heads", "2", "--model", "x", "--text", "y"], "--heads is of new models, got it with --model x"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", "--device", "cpu", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
