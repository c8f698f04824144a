"""``foxlm warmup`` and `compile_kernels`: every kernel that a model launches is there before it runs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.cli import app
from foxlm.kernels.backends import HAS_TRITON
from foxlm.modeling import attention_settings
from foxlm.warmup import compile_kernels
from kernel_device import INTERPRETED
from models import ROPE, SIZES

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from ahead_of_time import specializations

CONFIG = FoxConfig(**SIZES | ROPE | {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 4, "nope_layers": [0, 3]})
# What a process in which kernels were compiled prints of those that it still had to.
ON_GPU = """
import sys, torch
from triton import knobs
from foxlm import FoxConfig, FoxForCausalLM, FoxPagedCache
compiled = []
knobs.compilation.listener = lambda **x: compiled.append(x["metadata"]["name"]) if not x["cache_hit"] else None
config = FoxConfig.from_pretrained(sys.argv[1])
tokens = torch.arange(2 * 300, device="cuda").view(2, 300) % 97
model = FoxForCausalLM(config).to("cuda", torch.bfloat16)
model(tokens, labels=tokens).loss.backward()
with torch.autocast("cuda", torch.bfloat16):
    model.float()(tokens, labels=tokens).loss.backward()
model.bfloat16().eval()
mask = torch.ones_like(tokens)
mask[0, :7] = 0
for options in {}, {"cache_implementation": "static", "disable_compile": True}:
    model.generate(tokens, max_new_tokens=4, do_sample=False, **options)
    model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)
print("had to compile:", compiled)
"""


def warmup(*arguments: str):
    return CliRunner().invoke(app, ["warmup", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "h100"], "--arch must be sm_80 or newer, such as sm_90, got 'h100'"),
        (["--arch", "sm_75"], "--arch must be sm_80 or newer, such as sm_90, got 'sm_75'"),
        (["--arch", "sm_90", "--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["--arch", "sm_90", "--cache", "huge"], "caches must be of dynamic, static, paged, got 'huge'"),
        (["--arch", "sm_90", "--dtype", "int8"], "--dtype must be auto, bfloat16, float16, float32, got 'int8'"),
        (["--arch", "sm_90", "--dtype", "float64"], "--dtype must be auto, bfloat16, float16, float32, got 'float64'"),
    ],
)
def test_wrong_options_are_one_line(arguments, message):
    result = warmup("pro-125m", *arguments)
    assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")


def test_a_model_of_others_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    result = warmup(str(tmp_path), "--arch", "sm_90")
    assert (result.exit_code, result.stderr) == (1, "error: MODEL must be a FoX model, got one of model_type 'llama'\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_must_be_named():
    result = warmup("pro-125m")
    assert result.exit_code == 1
    assert "--arch must name a GPU to compile for, such as sm_90: torch sees none here" in result.stderr


def test_nothing_depends_on_what_kernels_that_are_left_out_would_have_written():
    # Memory that is not written holds NaN and the largest integers then.
    code = """
import torch
from foxlm import FoxConfig
from foxlm.warmup import compile_kernels
torch.use_deterministic_algorithms(True, warn_only=True)
config = FoxConfig.preset("pro-125m", num_hidden_layers=1)
compile_kernels(config, arch="sm_80", batch_size=2, caches=["dynamic", "static", "paged"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_of_all_that_a_model_does_are_found(arch):
    config = FoxConfig.preset("pro-125m", num_hidden_layers=1)
    state = torch.get_rng_state()
    with specializations(90) as found:
        assert compile_kernels(config, arch=arch, train=True, caches=["dynamic", "paged"]) == []
    assert torch.equal(torch.get_rng_state(), state)
    names = {name for name, _ in found}
    of_arch = {"hopper_forward_kernel", "hopper_backward_d64_kernel"}
    assert (of_arch <= names) == (arch == "sm_90")
    assert ({"_forward_kernel", "backward_kernel"} <= names) == (arch == "sm_80")
    assert {"_gate_scan_kernel", "_search_kernel", "_gradient_scan_kernel"} <= names
    assert {"_decode_search_kernel", "_decode_attend_kernel"} <= names
    with specializations(90) as for_inference:
        compile_kernels(config, arch=arch, caches=["dynamic"])
    assert for_inference < found


def test_long_prompts_find_their_kernels_though_short_ones_are_not_pruned(monkeypatch):
    monkeypatch.setattr(attention_settings, "_least_pairs", 2**28)
    with specializations(90) as found:
        compile_kernels(FoxConfig.preset("pro-125m", num_hidden_layers=1), arch="sm_90", caches=["dynamic"])
    assert attention_settings._least_pairs == 2**28
    assert {"_search_kernel", "hopper_forward_kernel"} <= {name for name, _ in found}


def test_batches_take_padding_in():
    """As a mask makes another kernel of attention in a decoding step."""
    config = FoxConfig.preset("pro-125m", num_hidden_layers=1)
    with specializations(90) as of_one:
        compile_kernels(config, arch="sm_90", caches=["dynamic"])
    with specializations(90) as of_two:
        compile_kernels(config, arch="sm_90", batch_size=2, caches=["dynamic"])
    assert len([name for name, _ in of_two - of_one if name == "_decode_attend_kernel"]) > 0


@pytest.mark.slow
def test_the_next_process_compiles_nothing(tmp_path):
    CONFIG.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "foxlm", "warmup", str(tmp_path / "model"), "--arch", "sm_80", "--train"]
    said = []
    for _ in range(2):
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        said.append(next(line for line in done.stdout.splitlines() if line.startswith("compiled ")))
    assert not said[0].startswith("compiled 0 ") and ", 0 were there:" in said[0]
    assert said[1].startswith("compiled 0 ") and ", 0 were there:" not in said[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("head_dim", [16, 64])
def test_what_a_builder_without_a_gpu_compiled_serves_a_gpu(head_dim, tmp_path):
    config = FoxConfig(**SIZES | {"hidden_size": 128, "head_dim": head_dim})
    FoxForCausalLM(config).save_pretrained(tmp_path / "model")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [sys.executable, "-m", "foxlm", "warmup", str(tmp_path / "model"), "--arch", arch, "--train"]
    command += ["--batch-size", "2", "--dtype", "bfloat16"]
    subprocess.run(command, check=True, env=environment | {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-c", ON_GPU, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "had to compile: []" in done.stdout
