"""`foxlm bench train`, on one device and on several, and what becomes of a rank that fails."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

import speed_ranks
from benchmark_rows import rows_of
from foxlm import FoxConfig, FoxForCausalLM
from foxlm.evaluation.benchmark import train
from foxlm.evaluation.benchmark.models import CPU_SIZES, Workload, build_fox, spread_decay_times
from foxlm.evaluation.benchmark.ranks import RankError, run_ranks
from foxlm.evaluation.benchmark.results import read
from foxlm.evaluation.benchmark.train import Recipe, compile_regions
from foxlm.evaluation.benchmark.train_multi_gpu import fully_sharded, measure_on_rank
from foxlm.evaluation.flops import forward_flops, training_flops
from foxlm.evaluation.gates import RULES

WORKLOAD = Workload("cpu", sizes=tuple(CPU_SIZES.items()))


def test_training_steps_are_measured() -> None:
    rows = rows_of(train.variants(Recipe(WORKLOAD, tokens=256)))
    assert [one["name"] for one in rows] == ["foxlm", *(f"foxlm, ACP {rule}" for rule in RULES)]
    for one in rows:
        assert one["status"] == "measured", one
        assert one["tokens_per_second"] == pytest.approx(256e3 / one["step"]["ms"])
        assert one["mfu"] == pytest.approx(one["model_flops"] / one["step"]["ms"] / one["matmul_tflops"] / 1e9)
        assert (one["computed_tiles"] < 1.0) == (one["rule"] is not None)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_model_that_is_trained(tied: bool) -> None:
    sizes = CPU_SIZES | {"tie_word_embeddings": tied}
    model = build_fox("pro-760m", sizes, "cpu").train()
    model.set_attn_implementation("eager")
    ids = torch.randint(256, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    # Eager attention computes the half that causality forbids, too: 2 matmuls forward and 4 backward in 2 layers.
    attention = 6 * 2 * (2 * 64 * 64**2) / 2
    assert counter.get_total_flops() == training_flops(model.config, 64) + attention
    assert forward_flops(model.config, 64)["attention"] == attention / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_the_model_have_the_benchmarks_decay_times(dtype: torch.dtype) -> None:
    model = build_fox("pro-760m", CPU_SIZES, "cpu", dtype)
    for layer in model.model.layers:
        bias = layer.get_parameter("self_attn.forget_gate.bias")
        assert bias.dtype == torch.float32
        assert layer.get_parameter("self_attn.q_proj.weight").dtype == dtype
        times = -1.0 / torch.nn.functional.logsigmoid(bias.detach().double())
        torch.testing.assert_close(times, spread_decay_times(4), rtol=1e-3, atol=0.0)


def test_control_a_step_with_wrong_attention_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_tight(model: Any, rule: str | None) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.25 if rule != "tight" else 0.3

    monkeypatch.setattr(train, "set_pruning", break_tight)
    rows = rows_of(train.variants(Recipe(WORKLOAD, tokens=128, only=("paper", "tight"))))
    assert [one["status"] for one in rows] == ["measured", "wrong"]
    assert "step" not in rows[1] and "are off by" in rows[1]["reason"]


def test_configuration_has_the_fields_that_turn_pruning_on() -> None:
    """transformers keeps an unknown field as an attribute: a renamed one would be set in vain."""
    assert {"acp_eps", "acp_rule"} <= set(FoxConfig.__dataclass_fields__)


# Several ranks


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def kept_for_backward(model: FoxForCausalLM, ids: Tensor) -> int:
    """Values that the layers' forward passes keep."""
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
        model = Recipe(WORKLOAD, checkpointing=checkpointing).build()
        fully_sharded(model, mesh)
        gate = model.get_parameter("model.layers.0.self_attn.forget_gate.weight")
        compile_regions(model)
        kept[checkpointing] = kept_for_backward(model, ids)
        assert gate.grad is not None and gate.grad.dtype == torch.float32
    # Of one layer about 40 times its input is kept, of a checkpointed one the input.
    assert kept[True] < kept[False] / 3
    assert not counters["graph_break"], counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 of 2: ValueError: the second one will not$") as caught:
        run_ranks(speed_ranks.raise_on_one, 2, "cpu", str(tmp_path))
    assert "and says why" in str(caught.value.__cause__)
    assert time.monotonic() - began < 300
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)


def test_control_a_lost_part_of_a_weight_is_found_and_not_timed(tmp_path: Path) -> None:
    measure, recipe = partial(measure_on_rank, shard=speed_ranks.losing_a_part), Recipe(WORKLOAD, 128, only=("tight",))
    results = {"schema": 2, "kind": "train", "run": {}, "settings": {}, "rows": []}
    run_ranks(measure, 2, "cpu", (recipe, 1), results, tmp_path / "results.json")
    (row,) = read(tmp_path / "results.json")["rows"]
    assert row["status"] == "wrong" and "step" not in row
    assert row["reason"].startswith("gradient of model.layers.1.mlp.")
