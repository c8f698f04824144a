"""What each rank of a tensor-parallel model computes for `test_tensor_parallel`, beside the same on one process."""

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import StaticCache, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from foxlm import FoxConfig, FoxForCausalLM, FoxPagedCache
from foxlm.modeling.generation import decoding_mode
from foxlm.modeling.layers.block import FoxDecoderLayer
from foxlm.modeling.parallel import small_sums as sums
from foxlm.modeling.versions import cache_of
from fsdp_on_cpu import accelerate_shards
from models import DECODING_VARIANTS, tokens

NEW = 6
# What is generated with: each switch that a cache or a step depends on.
GENERATED = (*DECODING_VARIANTS, "shared-qk-norm", "fixed-key-value", "gateless", "multi-head", "biases", "tied")
# Between them all modules that read a sharded weight themselves.
COMPILED = ("pro", "bias-only")
# With a bias of what is summed.
SUMMED = "biases"
# Long enough for pages to be freed, with decay times of 20 tokens at most.
PAGED_PROMPT = 300

Measured = dict[str, Any]


def load(folder: Path, ranks: int = 1, **kwargs: Any) -> FoxForCausalLM:
    """A float64 model, its heads dealt to ``ranks`` of them."""
    if ranks > 1:
        kwargs["distributed_config"] = DistributedConfig(tp_size=ranks)
    return FoxForCausalLM.from_pretrained(folder, dtype=torch.float64, **kwargs)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest expected value; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def whole(x: Tensor) -> Tensor:
    """A tensor as one process has it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def of_this_rank(x: Tensor, dim: int) -> Tensor:
    """The share of this rank."""
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def training(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """Logits, loss and gradients, added up over two batches of padded rows."""
    measured = {"logits": 0.0, "loss": 0.0}
    for model in (sharded, single):
        model.train()
    for seed in range(2):
        ids = tokens(2, 21, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        actual, expected = (model(ids, attention_mask=mask, labels=ids) for model in (sharded, single))
        for outputs in (actual, expected):
            outputs.loss.backward()
        measured["logits"] = max(measured["logits"], difference(actual.logits, expected.logits))
        measured["loss"] = max(measured["loss"], difference(actual.loss, expected.loss))
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    for name, parameter in single.named_parameters():
        actual = gradients.pop(name)
        assert (actual is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            measured[f"gradient of {name}"] = difference(whole(actual), parameter.grad)
    assert not gradients, list(gradients)
    for model in (sharded, single):
        model.eval()
    return measured


@torch.no_grad()
def generation(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """Logits of every step, and what is said at the end."""
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    measured = {}
    hows: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "beam": {"num_beams": 2},
    }
    for name, how in hows.items():
        actual, expected = (generate(model, ids, attention_mask=mask, **how) for model in (sharded, single))
        measured[f"{name} tokens"] = 0.0 if torch.equal(actual.sequences, expected.sequences) else 1.0
        measured[f"{name} logits"] = difference(torch.stack(actual.logits), torch.stack(expected.logits))
    return measured


def generate(model: FoxForCausalLM, ids: Tensor, **how: Any) -> Any:
    """What `generate` returns, with the logits of each step."""
    fixed = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **fixed, **how)


@torch.no_grad()
def compiled(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """A step of decoding, collectives included, traced as one graph."""
    ids, logits = tokens(2, 9), []
    torch.compiler.reset()
    step = torch.compile(sharded, backend="eager", fullgraph=True, dynamic=False)
    for model, forward, context in (
        (single, single, nullcontext),
        (sharded, step, nullcontext),
        (sharded, step, partial(decoding_mode, sharded)),
    ):
        with context():
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(ids, cache=cache)
            logits.append(forward(ids[:, :1].clone(), cache=cache).logits)
    return {
        "compiled step": difference(logits[1], logits[0]),
        "compiled step as generate runs it": difference(logits[2], logits[0]),
    }


@torch.no_grad()
def caches(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """Keys and values of this rank's heads, and no others; bounds of their logits."""
    ids = tokens(2, 21)
    actual, expected = (cache_of(model(ids, use_cache=True)) for model in (sharded, single))
    # One norm over all heads needs all of them.
    own = (lambda x, dim: x) if single.config.qk_norm == "all_heads" else of_this_rank
    measured = {}
    for index, (a, e) in enumerate(zip(actual.layers, expected.layers, strict=True)):
        measured[f"keys of layer {index}"] = difference(a.keys, own(e.keys, 1))
        measured[f"values of layer {index}"] = difference(a.values, own(e.values, 1))
        (c, *_), (all_c, *_) = a.gates, e.gates
        measured[f"gates of layer {index}"] = difference(c, all_c if all_c.shape[1] == 1 else own(all_c, 1))
    for index, (a, e) in enumerate(zip(sharded.model.layers, single.model.layers, strict=True)):
        found, wanted = (cast(FoxDecoderLayer, layer).logit_bounds(torch.float64) for layer in (a, e))
        assert (found is None) == (wanted is None)
        for x, y in zip(found or (), wanted or (), strict=True):
            measured[f"bounds of layer {index}"] = difference(x, y if len(y) == 1 else own(y, 0))
    return measured


@torch.no_grad()
def paged(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """Generation by `free_dead_cache`, and what is freed in a cache given to it."""
    ids, given = tokens(2, PAGED_PROMPT), []
    for model in (sharded, single):
        model.config.free_dead_cache = True
        given.append(FoxPagedCache(model.config, max_cache_len=512))
    measured = {}
    for name, hows in {
        "paged": ({}, {}),
        "given cache": tuple({"cache": cache} for cache in given),
    }.items():
        actual, expected = (generate(model, ids, **how) for model, how in zip((sharded, single), hows, strict=True))
        measured[f"{name} tokens"] = 0.0 if torch.equal(actual.sequences, expected.sequences) else 1.0
        measured[f"{name} logits"] = difference(torch.stack(actual.logits), torch.stack(expected.logits))
        assert isinstance(cache_of(actual), FoxPagedCache)
    freed = 0
    own = (lambda x, dim: x) if single.config.qk_norm == "all_heads" else of_this_rank
    for index, (a, e) in enumerate(zip(given[0].layers, given[1].layers, strict=True)):
        same = torch.equal(a.start, own(e.start, 1))
        measured[f"freed in layer {index}"] = 0.0 if same else 1.0
        freed += int(e.start.sum())
    return measured | {"pages freed": freed}


def saved(sharded: FoxForCausalLM, single: FoxForCausalLM, folder: Path) -> Measured:
    """Whether what is saved from all ranks is what was loaded, bit for bit."""
    sharded.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    again = load(folder).state_dict()
    expected = single.state_dict()
    assert list(again) == list(expected)
    return {f"saved {name}": 0.0 if torch.equal(again[name], x) else 1.0 for name, x in expected.items()}


def trained_after_generation(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """Losses of training that begins after generation, whose steps must reach the weights that generation reads."""
    measured = {}
    ids = tokens(2, 21)
    for step in range(2):
        losses = []
        for model in (sharded, single):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        measured[f"loss of step {step} after generation"] = difference(*losses)
    with torch.no_grad():
        outs = [torch.stack(generate(model, tokens(2, 9)).logits) for model in (sharded, single)]
    return measured | {"generation after that": difference(*outs)}


def within(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """What generation does to sharded weights, and that it undoes it."""
    weights = dict(sharded.named_parameters())
    values = {name: whole(x).detach().clone() for name, x in weights.items()}
    measured = {}
    for entry in range(2):
        with decoding_mode(sharded), decoding_mode(sharded):
            inside = {name: x for name, x in sharded.named_parameters() if isinstance(x, DTensor)}
            # The embedding alone, which may be the head's weight too.
            measured[f"sharded within {entry}"] = float(set(inside) - {"model.embed_tokens.weight"} != set())
            layer = cast(FoxDecoderLayer, sharded.model.layers[0])
            gathers = single.config.qk_norm == "all_heads"
            fused = layer.self_attn.fused_projections, layer.mlp.fused_projections
            measured[f"fused {entry}"] = float([x is None for x in fused] != [gathers, False])
            assert fused[1] is not None
            part = layer.mlp.gate_proj.weight
            measured[f"one memory {entry}"] = float(part.data_ptr() != fused[1].weight.data_ptr())
            # A loop of one's own looks at each call whether they still are.
            layer.mlp.uses_fused = "checked"
            with torch.no_grad():
                found = layer.mlp.project(torch.ones(1, 1, single.config.hidden_size, dtype=single.dtype))
            measured[f"checked {entry}"] = float(not found)
        after = dict(sharded.named_parameters())
        measured[f"restored {entry}"] = float(any(after[name] is not x for name, x in weights.items()))
    for name, x in after.items():
        measured[f"value of {name}"] = 0.0 if torch.equal(whole(x), values[name]) else 1.0
        if isinstance(x, DTensor) and "gate_proj" in name:
            local = x.to_local()
            measured[f"memory of {name}"] = float(local.untyped_storage().nbytes() != local.nbytes)
    return measured


def small_sums(sharded: FoxForCausalLM, single: FoxForCausalLM) -> Measured:
    """Sums by shared memory, with gloo in its place; and that ranks decide alike where one of them cannot."""
    library, summed = torch.library.Library("symm_mem", "IMPL"), []

    def one_shot_all_reduce_copy(buffer: Tensor, x: Tensor, op: str, group: str) -> Tensor:
        assert buffer.shape == x.shape and buffer.dtype == x.dtype and op == "sum"
        buffer.copy_(x)
        total = x.clone()
        dist.all_reduce(total)
        summed.append(x.numel())
        return total

    library.impl("one_shot_all_reduce_copy", one_shot_all_reduce_copy, "CPU")
    hosts = iter(range(100))
    device = torch.device("cpu", dist.get_rank())
    ids, measured = tokens(2, 9), {}
    for model in (sharded, single):
        model.float()
    expected = generate(single, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_may_share", lambda mesh: True)
        patch.setattr(sums, "_meet", lambda memory, group, device: memory)
        map_memory = sums._map_memory
        patch.setattr(sums, "_map_memory", lambda group, _: map_memory(group, device))

        def allocate(memory: Any, group: Any, device: Any) -> Tensor:
            return torch.empty(sums._SMALL, dtype=torch.uint8)

        def fail(memory: Any, group: Any, device: Any) -> Tensor:
            if dist.get_rank() == 1:
                raise RuntimeError("no peer access")
            return memory

        for name, hindrance in {
            "other hosts": ("platform.node", lambda: f"host {dist.get_rank()}-{next(hosts)}"),
            "one fails": ("_meet", fail),
            "shared": ("_allocate", allocate),
        }.items():
            sums._SHARED_MEMORY.clear()
            patch.setattr(sums, "_allocate", allocate)
            with pytest.MonkeyPatch.context() as inner:
                target = f"foxlm.modeling.parallel.small_sums.{hindrance[0]}"
                inner.setattr(target, hindrance[1])
                found = generate(sharded, ids)
            measured[f"{name}: tokens"] = 0.0 if torch.equal(found.sequences, expected.sequences) else 1.0
            off = difference(torch.stack(found.logits), torch.stack(expected.logits))
            measured[f"{name}: logits"] = 0.0 if off < 1e-5 else off
            measured[f"{name}: sums"] = float(bool(summed) != (name == "shared"))
    # o_proj and down_proj of each layer and step, and the prompt.
    measured["count"] = float(len(summed) != 2 * single.config.num_hidden_layers * NEW)
    return measured


def compare(folders: dict[str, Path]) -> dict[str, Measured]:
    """Every difference between a tensor-parallel model and the same on one process, by model."""
    quiet()
    measured = {}
    for variant, folder in folders.items():
        models = load(folder, dist.get_world_size()), load(folder)
        measured[variant] = training(*models) | caches(*models)
        if variant in GENERATED:
            measured[variant] |= within(*models) | generation(*models) | saved(*models, folder / "saved")
        if variant in DECODING_VARIANTS:
            measured[variant] |= paged(*models)
        if variant in COMPILED:
            measured[variant] |= compiled(*models)
        if variant in GENERATED:
            measured[variant] |= trained_after_generation(*models)
        if variant == SUMMED:
            measured[variant] |= small_sums(*models)
    return measured


def compare_without(folders: dict[str, Path], entries: dict[str, str]) -> dict[str, Measured]:
    """Differences in training where one entry of the plan of attention is left out, by model."""
    quiet()
    plan, measured = FoxConfig._attention_plan, {}

    def weakened(left: str) -> Any:
        return lambda config: {name: style for name, style in plan(config).items() if name != left}

    for variant, folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FoxConfig, "_attention_plan", weakened(entries[variant]))
            models = load(folder, dist.get_world_size()), load(folder)
        measured[variant] = training(*models)
    return measured


def refusals(folders: dict[str, Path], sizes: dict[str, int]) -> dict[str, str]:
    """What loading each model says."""
    said = {}
    for name, folder in folders.items():
        with pytest.raises(ValueError) as error:
            load(folder, sizes[name])
        said[name] = str(error.value)
    return said


def train_by_hand(folder: Path, ranks: int) -> list[float]:
    """Losses of ten steps of AdamW in float32."""
    distributed = {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
    model = FoxForCausalLM.from_pretrained(folder, **distributed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(10):
        ids = tokens(4, 32, seed=step % 3)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_by_trainer(folder: Path, output: Path, ranks: int) -> list[float]:
    """Losses and gradient norms of ten steps of Trainer, with accumulation and clipping; saves the model."""
    distributed = {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
    model = FoxForCausalLM.from_pretrained(folder, **distributed)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-2,
        logging_steps=1,
        # transformers keeps no optimizer of a model that was sharded at loading, and 5.17 saves from one rank only.
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(48, 24)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    model.save_pretrained(output, is_main_process=trainer.is_world_process_zero())
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[name] for entry in history for name in ("loss", "grad_norm")]


def train(folder: Path, output: Path) -> tuple[list[float], list[float]]:
    """What both ways give on these ranks."""
    quiet()
    with accelerate_shards():
        return train_by_hand(folder, dist.get_world_size()), train_by_trainer(folder, output, dist.get_world_size())


def quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def train_and_refuse(
    trained: Path,
    output: Path,
    weakened: dict[str, Path],
    entries: dict[str, str],
    refused: dict[str, Path],
    sizes: dict,
) -> tuple[Any, dict[str, Measured], dict[str, str]]:
    """`train`, `compare_without` and `refusals` in one start of the processes."""
    return train(trained, output), compare_without(weakened, entries), refusals(refused, sizes)
