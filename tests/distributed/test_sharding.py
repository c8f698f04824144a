"""Data parallelism by DDP, FSDP and DeepSpeed: the loss curve of one process, checkpoints, and what is refused."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

import sharding_checks
from foxlm import FoxForCausalLM
from foxlm.modeling.parallel.fsdp import prepare_fsdp2
from models import assert_close, tiny_model, tokens
from ranks import free_port, kill_session, run_ranks
from sharding_checks import Case, Trained

ROOT = Path(__file__).resolve().parents[2]
BFLOAT16 = {"bf16": True}
PRECISE = 1e-5
# transformers 5.23 gives weights that stay in float32 groups of their own, 5.17 does not.
GROUPS_BY_TYPE = "fsdp_plan" in DistributedConfig.__dataclass_fields__
CASES = {
    "ddp": Case(engine="ddp"),
    "fsdp": Case(),
    "recomputed by FSDP": Case(fsdp={"activation_checkpointing": True}),
    "recomputed by Trainer": Case(arguments={"gradient_checkpointing": True}),
    "loss in chunks": Case(model={"loss_chunk_size": 7}),
    "context parallel": Case(engine="ddp", context=2),
    "context parallel, FSDP": Case(context=2, model={"loss_chunk_size": 7}),
    "tied": Case(model={"tie_word_embeddings": True, "loss_chunk_size": 7}),
    "each rank counts for itself": Case(arguments={"average_tokens_across_devices": False}),
    "bf16": Case(arguments=BFLOAT16),
    "bf16 in chunks, recomputed": Case(
        arguments=BFLOAT16, model={"loss_chunk_size": 7}, fsdp={"activation_checkpointing": True}
    ),
    "bf16 as accelerate has it": Case(arguments=BFLOAT16, prepare=False),
    "half": Case(dtype=torch.bfloat16),
    "half as accelerate has it": Case(dtype=torch.bfloat16, prepare=False),
    "four for two": Case(groups=(2, 2)),
    "loaded by one": Case(fsdp={"cpu_ram_efficient_loading": True}),
}


def worst(actual: list[float], expected: list[float]) -> float:
    """Largest relative difference of two curves."""
    assert len(actual) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One process."""
    out = str(tmp_path_factory.mktemp("alone"))
    cases = {"float32": Case(), "tied": Case(model={"tie_word_embeddings": True}), "bf16": Case(arguments=BFLOAT16)}
    cases |= {"half": Case(dtype=torch.bfloat16)}
    for case in cases.values():
        case.engine = "ddp"
    return {name: sharding_checks.train(case, out) for name, case in cases.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("pro", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> tuple[dict[str, Trained | str], list[dict]]:
    """Two processes."""
    loads = [(str(saved), torch.float32)] + [(str(saved), torch.bfloat16)] * GROUPS_BY_TYPE
    return run_ranks("sharding_checks:work", 2, CASES, str(tmp_path_factory.mktemp("together")), loads, timeout=400)[0]


def trained(together: tuple[dict[str, Trained | str], list[dict]], name: str) -> Trained:
    result = together[0][name]
    assert isinstance(result, Trained), result
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("ddp", "fsdp", "recomputed by FSDP", "recomputed by Trainer", "loss in chunks", "tied"),
        *("context parallel", "context parallel, FSDP"),
    ],
)
def test_two_processes_train_as_one(together: Any, alone: dict[str, Trained], name: str) -> None:
    expected = alone.get(name, alone["float32"])
    result = trained(together, name)
    assert result.engine == ("MULTI_CPU" if CASES[name].engine == "ddp" else "FSDP")
    assert worst(result.losses, expected.losses) < PRECISE
    assert worst(result.norms, expected.norms) < PRECISE
    assert max(expected.losses) > 1.02 * min(expected.losses), "else a curve that stands still would pass"
    assert len(result.skipped_shares) == (0 if CASES[name].context > 1 else len(result.losses))
    assert abs(result.tokens - expected.tokens) < 0.01 * expected.tokens


@pytest.mark.slow
def test_control_ranks_must_count_the_tokens_of_all(together: Any, alone: dict[str, Trained]) -> None:
    result = trained(together, "each rank counts for itself")
    assert worst(result.losses, alone["float32"].losses) > 100 * PRECISE


@pytest.mark.slow
def test_gates_stay_in_float32_in_mixed_precision(together: Any, alone: dict[str, Trained]) -> None:
    exact = alone["float32"].gate_bias
    for name in ("bf16", "bf16 in chunks, recomputed", "half"):
        result = trained(together, name)
        expected = alone["half" if name == "half" else "bf16"]
        assert (result.gate_weight, result.gate_logits) == ("torch.float32", "torch.float32")
        assert result.gate_bias == expected.gate_bias
        assert worst(result.losses, expected.losses) < 2**-7
        assert not all((64 * loss).is_integer() for loss in result.losses)
    rounded = trained(together, "bf16 as accelerate has it")
    assert rounded.gate_weight == "torch.bfloat16" and rounded.gate_bias != exact
    # The mean of two losses of about 8 in bfloat16.
    assert all((64 * loss).is_integer() for loss in rounded.losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half as accelerate has it", "FSDP expects uniform original parameter dtype"),
        ("four for two", "Mesh should not be bigger than default world size 2, but found 4"),
        ("loaded by one", "ValueError: fsdp_cpu_ram_efficient_loading must be false"),
    ],
)
def test_what_cannot_be_sharded_is_refused(together: Any, name: str, message: str) -> None:
    assert message in together[0][name]


@pytest.mark.slow
def test_models_loaded_sharded_by_transformers_compute_the_same(together: Any, saved: Path) -> None:
    model = FoxForCausalLM.from_pretrained(saved).train()
    rows = tokens(2, 24)
    loss = model(rows, labels=rows).loss
    loss.backward()
    text = model.eval().generate(tokens(1, 150), max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()
    exact = together[1][0]
    assert abs(exact["loss"] - loss.item()) < PRECISE * loss.item()
    # With the cache of a sharded model, and with one that frees by bounds of its sharded weights.
    assert exact["texts"] == [text, text]
    for name, weight in model.named_parameters():
        assert isinstance(weight.grad, Tensor)
        assert_close(exact["gradients"][name], weight.grad, PRECISE)


@pytest.mark.slow
@pytest.mark.skipif(not GROUPS_BY_TYPE, reason="this transformers shards float32 weights only")
def test_models_loaded_sharded_in_half_precision_have_float32_gates(together: Any) -> None:
    exact, half = together[1]
    assert half["groups"] > exact["groups"]
    assert half["gradients"]["model.layers.0.self_attn.forget_gate.bias"].dtype == torch.float32
    assert half["gradients"]["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert abs(half["loss"] - exact["loss"]) < 0.02 * exact["loss"]


def test_processes_that_fsdp_was_asked_for_and_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    prepare_fsdp2(accelerator, tiny_model())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for, but .*distributed_type must be FSDP, got NO on cpu"):
        prepare_fsdp2(accelerator, tiny_model())


def pretrain() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("example_pretrain", ROOT / "examples" / "pretrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def launch(config: str, processes: int, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` of examples/pretrain.py with one of its configurations, on CPU processes, in float32."""
    command = ["accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate" / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", str(free_port()), "--mixed_precision", "no"]
    command += [
        str(ROOT / "tests" / "utils" / "ranks" / "launched_on_cpu.py"),
        str(ROOT / "examples" / "pretrain.py"),
        *arguments,
    ]
    return run_module(command, ACCELERATE_USE_CPU="true", **environment)


def run_module(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """``python -m`` of it, with all that it starts ended after 150 s."""
    command = [sys.executable, "-m", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        kill_session(process)
    return subprocess.CompletedProcess(command, process.returncode, output)


def curve(out: Path) -> list[float]:
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    for index in range(8):
        (folder / f"{index}.txt").write_text(" ".join(str(index * number) for number in range(60 + 20 * index)))
    sizes = ["--length", "40", "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"]
    steps = ["--max_steps", "8", "--save_steps", "4", "--learning_rate", "1e-2", "--held_out", "0"]
    quiet = ["--report_to", "none", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"]
    return ["--text", str(folder), *sizes, *steps, *quiet]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of two processes, sharded, of which one dies at step 6."""
    out = tmp_path_factory.mktemp("killed")
    given = [*arguments, "--output_dir", str(out), "--per_device_train_batch_size", "4"]
    return out, launch("fsdp2", 2, given, DIE_AT_STEP="6")


@pytest.mark.slow
def test_a_run_stops_when_a_process_dies(killed: tuple[Path, subprocess.CompletedProcess]) -> None:
    out, done = killed
    assert done.returncode != 0
    assert re.search(r"ChildFailedError(?s:.*)Root Cause(?s:.*)rank +: 1 (?s:.*)Signal 9 \(SIGKILL\)", done.stdout), (
        done.stdout
    )
    assert (out / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()
    assert not (out / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [("hsdp", 4), ("fsdp2", 1)])
def test_and_goes_on_from_its_checkpoint_on_another_number_of_them(
    killed: tuple[Path, subprocess.CompletedProcess],
    uninterrupted: Path,
    arguments: list[str],
    tmp_path: Path,
    config: str,
    processes: int,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(killed[0], out)
    # As if it had died once more, while it saved.
    (out / "checkpoint-6").mkdir()
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-7" / "trainer_state.json").write_text('{"epoch":')
    given = ["--output_dir", str(out), "--per_device_train_batch_size", str(8 // processes), "--resume"]
    done = launch(config, processes, [*arguments, *given])
    assert done.returncode == 0, done.stdout[-3000:]
    assert "returned a view tensor" not in done.stdout
    assert worst(curve(out), curve(uninterrupted)) < PRECISE
    expected = FoxForCausalLM.from_pretrained(uninterrupted).state_dict()
    for name, weight in FoxForCausalLM.from_pretrained(out).state_dict().items():
        assert_close(weight, expected[name], PRECISE)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    pretrain().main([*arguments, "--output_dir", str(out), "--per_device_train_batch_size", "8"])
    assert curve(out)[-1] < 0.95 * curve(out)[0]
    return out


@pytest.mark.slow
def test_a_sharded_checkpoint_is_not_resumed_without_fsdp(
    killed: tuple[Path, subprocess.CompletedProcess], arguments: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"only supported when using PyTorch FSDP"):
        pretrain().main([*arguments, "--output_dir", str(killed[0]), "--resume"])


def test_processes_that_would_train_each_alone_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = TrainingArguments(str(tmp_path), use_cpu=True)
    pretrain().check_processes(one)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but training sees 1, on cpu"):
        pretrain().check_processes(one)


@pytest.mark.parametrize(("replicas", "shards"), [(2, 2), (2, 1), (1, 3)])
def test_sizes_that_are_not_the_number_of_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replicas: int, shards: int
) -> None:
    one = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", str(replicas))
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(shards))
    with pytest.raises(ValueError, match=f"1 processes, got dp_replicate_size {replicas}, dp_shard_size {shards}"):
        pretrain().check_processes(one)


def test_fsdp_needs_a_launcher(monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path) -> None:
    # Put back afterwards: accelerate sets it.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    with pytest.raises(ValueError, match=r"Using fsdp only works in distributed training"):
        pretrain().main([*arguments, "--output_dir", str(tmp_path), "--fsdp"])


@pytest.mark.slow
def test_deepspeed_trains_as_one_process(uninterrupted: Path, arguments: list[str], tmp_path: Path) -> None:
    """With the shipped configuration gates stay in float32; in float32 altogether the curve is that of one process."""
    pytest.importorskip("deepspeed")
    shipped = json.loads((ROOT / "examples" / "accelerate" / "deepspeed_zero3.json").read_text())
    for name, exact in (("exact", True), ("shipped", False)):
        out, config = tmp_path / name, tmp_path / f"{name}.json"
        config.write_text(json.dumps(shipped | {"torch_autocast": {"enabled": not exact, "dtype": "bfloat16"}}))
        command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        command += [str(ROOT / "examples" / "pretrain.py"), *arguments, "--output_dir", str(out)]
        command += ["--per_device_train_batch_size", "4", "--deepspeed", str(config)]
        done = run_module(command, DS_ACCELERATOR="cpu")
        assert done.returncode == 0, done.stdout[-3000:]
        assert any(path.name.startswith("global_step") for path in (out / "checkpoint-4").iterdir()), "by DeepSpeed"
        difference = worst(curve(out), curve(uninterrupted))
        assert difference < PRECISE if exact else PRECISE < difference < 2**-7
        saved = FoxForCausalLM.from_pretrained(out)
        assert {weight.dtype for weight in saved.parameters()} == {torch.float32}
