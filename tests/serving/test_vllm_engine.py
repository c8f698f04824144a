"""FoX in vLLM's engine, in this process: tokens and log-probabilities are those of transformers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Before vLLM is imported: one process, one thread, nothing sent anywhere.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
# Of small models, which longer texts are tried on, too.
os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
pytest.importorskip("vllm", reason="make test-vllm installs vLLM into an environment of its own")

from peft import LoraConfig, get_peft_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from foxlm import FoxForCausalLM, FoxForSequenceClassification, peft_targets
from foxlm.modeling.vllm import blocks_read, ranks
from foxlm.modeling.vllm.limits import check_limits
from models import LLAMA, VARIANTS, rope, tiny_config, tiny_model, tokens

# Kernels take pages of 64 tokens; PyTorch takes any, and small ones are faster to test.
ON_GPU = torch.cuda.is_available()
PAGE = 64 if ON_GPU else 8
NEW = 16
LENGTHS = (60, 120, 184, 72) if ON_GPU else (5, 17, 23, 9)
LONGEST = 8 * PAGE
# Less than all requests need at once, in chunks shorter than prompts.
SMALL = {
    "num_gpu_blocks_override": 10 if ON_GPU else 12,
    "max_num_batched_tokens": 2 * PAGE,
    "max_num_seqs": 4,
}


@contextmanager
def engine(model: Any, folder: Path, **options: Any) -> Iterator[LLM]:
    model.save_pretrained(folder)
    defaults = {
        "dtype": "float32",
        "max_model_len": LONGEST,
        "block_size": PAGE,
        "kv_cache_memory_bytes": 1 << 24,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "enforce_eager": True,
    }
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def greedy(count: int = NEW, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=0, detokenize=False, **options)


def answer_in_turn(llm: LLM, prompts: list[list[int]], every: int = 2) -> list[Any]:
    """One more request after each so many steps of the engine, which goes on with those before."""
    engine, done, steps, waiting = llm.llm_engine, {}, 0, list(enumerate(prompts))
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % every == 0:
            index, prompt = waiting.pop(0)
            engine.add_request(f"{id(prompts)}-{index}", {"prompt_token_ids": prompt}, greedy())
        for output in engine.step():
            if output.finished:
                done[int(output.request_id.split("-")[1])] = output
        steps += 1
    return [done[i] for i in range(len(prompts))]


def answer(llm: LLM, prompts: list[list[int]], params: SamplingParams | None = None) -> list[Any]:
    return llm.generate([{"prompt_token_ids": x} for x in prompts], params or greedy(), use_tqdm=False)


def counted(llm: LLM, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


@torch.no_grad()
def assert_as_transformers(model: Any, prompts: list[list[int]], outputs: list[Any]) -> None:
    """One pass over what was answered: each token is the likeliest, and so what greedy decoding writes."""
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        written = torch.tensor(answer.token_ids)
        assert len(written) == NEW
        logits = model(torch.tensor([prompt + list(answer.token_ids)])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == written.tolist()
        expected = logits.log_softmax(-1).gather(1, written[:, None])[:, 0]
        given = torch.tensor([x[token].logprob for x, token in zip(answer.logprobs, answer.token_ids, strict=True)])
        assert (given - expected).abs().max() < 1e-4


def prompts() -> list[list[int]]:
    return [tokens(length, seed=length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_in_chunks_preempted_and_in_turn(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, dtype=torch.float32)
    with engine(model, tmp_path, **SMALL) as llm:
        assert_as_transformers(model, prompts(), answer_in_turn(llm, prompts()))
        assert_as_transformers(model, prompts(), answer(llm, prompts()))
        assert counted(llm, "num_preemptions") > 0


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("variant", ["pro", "gateless", "rope-sink", "multi-query", "pro-no-qk-norm"])
def test_captured_steps(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, dtype=torch.float32)
    sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    with engine(model, tmp_path, **SMALL, enforce_eager=False, compilation_config=sizes) as llm:
        mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        assert mode.name == "FULL_DECODE_ONLY", "vLLM captures nothing, and only warns"
        assert_as_transformers(model, prompts(), answer_in_turn(llm, prompts()))
        # The page of a prompt is filled by another request, in steps of one token for each.
        asked = [tokens(PAGE - 1, seed=3).tolist()]
        (first,) = answer(llm, asked)
        filled = [asked[0] + list(first.outputs[0].token_ids)[: 1 + n] for n in range(3)]
        assert_as_transformers(model, filled, answer_in_turn(llm, filled, every=1))
        assert counted(llm, "num_preemptions") > 0


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("captured", [False, True])
def test_how_much_of_the_cache_decoding_reads(captured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple] = []
    monkeypatch.setattr(blocks_read.logger, "info", lambda message, *values: said.append(values))
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1e-6")
    # Every head forgets within some tokens.
    model = tiny_model("llama", dtype=torch.float32, acp_eps=1e-6, decay_time_max=4.0)
    sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]}
    with engine(model, tmp_path, enforce_eager=not captured, compilation_config=sizes) as llm:
        answer(llm, [tokens(PAGE, seed=1).tolist()])
        said.clear()
        outputs = answer(llm, [tokens(5 * PAGE, seed=2).tolist()])
    assert_as_transformers(model, [tokens(5 * PAGE, seed=2).tolist()], outputs)
    assert said
    _, read, share, there = zip(*said, strict=True)
    assert 0 < sum(read) < 0.6 * sum(there)
    assert all(x == pytest.approx(100 * r / t) for x, r, t in zip(share, read, there, strict=True))


def test_what_was_read_is_logged_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    said, clock = [], [100.0]
    monkeypatch.setattr(blocks_read.logger, "info", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(blocks_read.time, "monotonic", lambda: clock[0])
    done = SimpleNamespace(record=lambda: None, query=lambda: clock[0] >= 111.0)
    monkeypatch.setattr(blocks_read.torch.cuda, "Event", lambda: done)
    monkeypatch.setattr(blocks_read.torch.cuda, "is_current_stream_capturing", lambda: False)
    read = blocks_read.BlocksRead(50_000_000, torch.device("cpu"))
    read.counts += torch.tensor([3, 12])
    for now in (105.0, 110.0, 110.5):
        clock[0] = now
        read.look()
        assert not said
    # Of the copy that was asked for.
    read.counts += torch.tensor([1, 4])
    clock[0] = 111.0
    read.look()
    assert said == ["FoX: in 11.0 s decoding read 0.150 GB of the cache, 25.0% of the 0.600 GB that its requests hold"]
    for now in (121.0, 121.5):
        clock[0] = now
        read.look()
    assert said[1:] == [
        "FoX: in 10.5 s decoding read 0.050 GB of the cache, 25.0% of the 0.200 GB that its requests hold"
    ]
    for now in (140.0, 141.0):
        clock[0] = now
        read.look()
    assert len(said) == 2


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
def test_other_sizes_of_blocks_are_refused_on_a_gpu(tmp_path: Path) -> None:
    model = tiny_model("pro", dtype=torch.float32)
    refused = "block_size must be 64 for a FoX model on a GPU, got 128"
    with pytest.raises(ValueError, match=refused), engine(model, tmp_path, block_size=128):
        pass
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3", "proportional"])
def test_types_of_rope(rope_type: str, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32, rope_parameters=rope(rope_type))
    with engine(model, tmp_path, **SMALL) as llm:
        assert_as_transformers(model, prompts(), answer(llm, prompts()))


@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_requests_share_prefixes(variant: str, tmp_path: Path) -> None:
    """Pages of requests that have ended, and of requests that are computed in the same step."""
    model = tiny_model(variant, dtype=torch.float32)
    prefix = tokens(6 * PAGE, seed=3).tolist()
    asked = [prefix + tokens(length, seed=length).tolist() for length in (1, 1, 7, 2 * PAGE + 4)]
    with engine(model, tmp_path, max_model_len=12 * PAGE) as llm:
        outputs = answer(llm, [*asked, asked[3]])
        assert_as_transformers(model, [*asked, asked[3]], outputs)
        assert sorted(x.num_cached_tokens for x in outputs) == [0, *[6 * PAGE] * 3, 8 * PAGE]
        later = answer(llm, asked)
        assert_as_transformers(model, asked, later)
        assert all(x.num_cached_tokens >= 6 * PAGE for x in later)


def test_gates_of_zero_hide_what_is_before_them(tmp_path: Path) -> None:
    model = tiny_model("pro", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            # Some tokens have a gate far below the smallest number.
            layer.self_attn.forget_gate.weight.mul_(2e4)
    with engine(model, tmp_path, **SMALL) as llm:
        assert_as_transformers(model, prompts(), answer(llm, prompts()))


def test_half_precision_is_as_near_as_transformers(tmp_path: Path) -> None:
    """Log-probabilities of prompts in bfloat16, against float64: the error of either is rounding of the same size."""
    half = tiny_model("pro", dtype=torch.float32).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    half = FoxForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    exact = FoxForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    asked = prompts()
    with engine(half, tmp_path, dtype="bfloat16", max_num_batched_tokens=3 * PAGE, max_num_seqs=6) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = answer(llm, asked, params)
    errors: dict[str, list[torch.Tensor]] = {"vllm": [], "transformers": []}
    for prompt, output in zip(asked, outputs, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            want, near = (
                x(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for x in (exact, half)
            )
        given = torch.tensor(
            [x[token].logprob for x, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        )
        errors["vllm"].append((given - want).abs())
        errors["transformers"].append((near - want).abs())
    ours, theirs = (torch.cat(x) for x in errors.values())
    assert 0 < ours.mean() <= 1.5 * theirs.mean() and ours.max() <= 2.0 * theirs.max()


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("variant", ["pro", "rope-sink", "biases"])
def test_heads_over_two_ranks(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism: chunks, preemption and requests in turn as on one rank."""
    # One core for each rank: by itself vLLM wants a NUMA node for each.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = tiny_model(variant, dtype=torch.float32)
    with engine(model, tmp_path, **SMALL, tensor_parallel_size=2) as llm:
        assert_as_transformers(model, prompts(), answer_in_turn(llm, prompts()))
        assert counted(llm, "num_preemptions") > 0


@pytest.mark.parametrize("variant", ["pro", "rope-sink"])
@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.skipif(not ON_GPU, reason="CUDA"))])
def test_each_request_has_its_adapter(variant: str, captured: bool, tmp_path: Path) -> None:
    """Two LoRA and none in the same steps; and an adapter that also holds gates is refused by name."""
    model = tiny_model(variant, dtype=torch.float32)
    targets = peft_targets(model)["target_modules"]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets), adapter_name="one")
    peft.add_adapter("two", LoraConfig(r=8, lora_alpha=4, target_modules=targets))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    peft.save_pretrained(str(tmp_path / "adapters"))
    requests = [LoRARequest(name, 1 + i, str(tmp_path / "adapters" / name)) for i, name in enumerate(("one", "two"))]
    gates = get_peft_model(tiny_model(variant, dtype=torch.float32), LoraConfig(**peft_targets(model)))
    gates.save_pretrained(str(tmp_path / "gates"))
    base = tiny_model(variant, dtype=torch.float32)
    # One slot more than adapters: on a CPU vLLM gives requests that have none what is in the last.
    options = {**SMALL, "enable_lora": True, "max_loras": 3, "max_lora_rank": 8, "enforce_eager": not captured}
    with engine(base, tmp_path / "base", **options) as llm:
        asked = [{"prompt_token_ids": x} for x in prompts()]
        outputs = llm.generate(asked, greedy(), use_tqdm=False, lora_request=[None, *requests, None])
        assert_as_transformers(base, [prompts()[0], prompts()[3]], [outputs[0], outputs[3]])
        for i, name in ((1, "one"), (2, "two")):
            peft.set_adapter(name)
            assert_as_transformers(peft, [prompts()[i]], [outputs[i]])
        texts = {tuple(answer(llm, [prompts()[i]])[0].outputs[0].token_ids) for i in (1, 2)}
        assert not texts & {tuple(outputs[i].outputs[0].token_ids) for i in (1, 2)}, "adapters change nothing"
        with pytest.raises(ValueError, match="forget_gate"):
            llm.llm_engine.add_lora(LoRARequest("gates", 3, str(tmp_path / "gates")))
        assert_as_transformers(base, prompts(), answer(llm, prompts()))


def test_sampling_has_the_models_distribution(tmp_path: Path) -> None:
    model = tiny_model("pro", dtype=torch.float32)
    prompt = tokens(9, seed=1).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    with engine(model, tmp_path) as llm:
        params = SamplingParams(n=512, temperature=1.0, max_tokens=1, seed=0, detokenize=False)
        (output,) = answer(llm, [prompt], params)
    drawn = torch.bincount(torch.tensor([x.token_ids[0] for x in output.outputs]), minlength=len(expected)) / 512
    # Of 512 draws from 97 tokens; the same draws from a uniform distribution are at 0.35 or more.
    assert (drawn - expected).abs().sum() / 2 < 0.2


def test_what_does_not_fit_is_refused_and_the_next_request_is_right(tmp_path: Path) -> None:
    model = tiny_model("pro", dtype=torch.float32)
    with engine(model, tmp_path, **SMALL) as llm:
        with pytest.raises(VLLMValidationError, match=str(LONGEST)):
            answer(llm, [tokens(LONGEST + 1).tolist()])
        assert_as_transformers(model, prompts(), answer(llm, prompts()))


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"rope_parameters": rope("dynamic")}, {}, "rope_type"),
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({}, {"quantization": "fp8"}, "quantization"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.float32, **changes)
    with pytest.raises(ValueError, match=named), engine(model, tmp_path, **options):
        pass
    cleanup_dist_env_and_memory()


def test_task_heads_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32, model_class=FoxForSequenceClassification)
    refused = "runner must be 'generate' for a FoX model on vLLM, got 'pooling'"
    with pytest.raises(ValueError, match=refused), engine(model, tmp_path):
        pass
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("part", "field", "value", "named"),
    [
        ("device_config", "device_type", "xpu", "device"),
        ("parallel_config", "tensor_parallel_size", 3, "tensor_parallel_size must divide num_attention_heads"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline_parallel_size"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill_context_parallel_size"),
        ("parallel_config", "use_ubatching", True, "enable_dbo or ubatch_size"),
        ("offload_config", "uva", SimpleNamespace(cpu_offload_gb=1), "cpu_offload_gb"),
        ("offload_config", "prefetch", SimpleNamespace(offload_group_size=2), "offload_group_size"),
        ("model_config", "enable_prompt_embeds", True, "enable_prompt_embeds"),
        (None, "speculative_config", object(), "speculative_config"),
        (None, "kv_transfer_config", object(), "kv_transfer_config"),
    ],
)
def test_every_limit_of_an_engine_is_named(part: str | None, field: str, value: Any, named: str) -> None:
    config = engine_config()
    check_limits(tiny_config("rope-sink"), config)
    setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(ValueError, match=named):
        check_limits(tiny_config("rope-sink"), config)


def test_ranks_take_no_adapters_and_no_norm_over_all_heads() -> None:
    config = engine_config()
    config.parallel_config.tensor_parallel_size = 2
    check_limits(tiny_config("pro"), config)
    with pytest.raises(ValueError, match="qk_norm is 'all_heads', got 2"):
        check_limits(tiny_config("olmo"), config)
    config.lora_config = SimpleNamespace(max_loras=8)
    with pytest.raises(ValueError, match="enable_lora must be False with tensor_parallel_size 2"):
        check_limits(tiny_config("pro"), config)


def test_a_rank_refuses_weights_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(ranks, "get_tensor_model_parallel_world_size", lambda: 2)
    own = {"q_proj.weight": torch.empty(4, 6)}
    whole = torch.randn(8, 6)
    (found,) = ranks.weights_of_rank([("q_proj.weight", whole)], own, tiny_config())
    assert found[0] == "q_proj.weight" and torch.equal(found[1], whole[4:])
    with pytest.raises(ValueError, match=r"q_proj.weight must be \[4, 6\] or 2 such parts side by side, got \[8, 12\]"):
        list(ranks.weights_of_rank([("q_proj.weight", torch.empty(8, 12))], own, tiny_config()))


@pytest.mark.skipif(ON_GPU, reason="a CPU's LoRA")
def test_slots_of_adapters_on_a_cpu_are_warned_of() -> None:
    config = engine_config()
    config.lora_config = SimpleNamespace(max_loras=2)
    with pytest.warns(UserWarning, match="max_loras must be greater .* got 2"):
        check_limits(tiny_config("pro"), config)


def engine_config() -> SimpleNamespace:
    """What `check_limits` reads of vLLM's configuration, as it is by default."""
    sizes = ("tensor", "pipeline", "decode_context", "prefill_context")
    return SimpleNamespace(
        model_config=SimpleNamespace(runner_type="generate", quantization=None, enable_prompt_embeds=False),
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(**{f"{name}_parallel_size": 1 for name in sizes}, use_ubatching=False),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
    )


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    model = tiny_model("pro", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    changed = FoxForCausalLM.from_pretrained(tmp_path, **LLAMA)
    changed.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    with pytest.raises(ValueError, match="output_gate"):
        LLM(str(tmp_path), dtype="float32", kv_cache_memory_bytes=1 << 24, skip_tokenizer_init=True, max_model_len=96)
    cleanup_dist_env_and_memory()
