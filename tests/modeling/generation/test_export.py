"""Exported programs, fed token by token, give what the model gives without a cache."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache, convert_and_export_with_cache

from models import LLAMA, assert_close, tiny_model, tokens

# Blocks with and without what a cache holds for them, and every number of gates.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pro": ("pro", {}),
    "llama-rope": ("llama-rope", {}),
    "llama-key-shift": ("llama-key-shift", {}),
    "key-value-gates": ("key-value-gates", {}),
    "bias-only": ("bias-only", LLAMA),
    "fixed": ("fixed", LLAMA),
    "gateless": ("gateless", {}),
}
# Every variant in one type, and two in the other.
CASES = [
    *((name, torch.float32) for name in VARIANTS),
    *((name, torch.bfloat16) for name in ("pro", "llama-rope")),
]
PROMPT, LENGTH, ROOM = 8, 20, 32
# Of the largest logit: a step rounds otherwise than a pass over all tokens.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def exportable(name: str, dtype: torch.dtype) -> Any:
    variant, overrides = VARIANTS[name]
    return tiny_model(variant, dtype=dtype, num_hidden_layers=1, **overrides)


class Chain:
    """Prefill and decoding step as transformers' exporters make them, the cache of one given to the next."""

    def __init__(self, model: Any, static: bool, batch: int = 2) -> None:
        options = copy.deepcopy(model.generation_config)
        options.do_sample = False
        if static:
            options.cache_implementation, options.max_cache_len = "static", ROOM
        prompt = {"input_ids": tokens(batch, PROMPT), "attention_mask": torch.ones(batch, PROMPT, dtype=torch.long)}
        self.programs, self.samples = {}, {}
        for stage, (part, sample) in decompose_for_generation(model, prompt, generation_config=options).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported: Any = DynamoExporter().export(part, copy.deepcopy(sample), DynamoConfig(dynamic=not static))
            program = getattr(exported, "program", exported)
            self.programs[stage] = program.module()
            self.samples[stage] = {name: sample[name] for name in program.call_spec.in_spec.children()[1].context}
        self.cache = "cache" if "cache" in self.samples["decode"] else "past_key_values"

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Logits of ``ids``, whose first tokens are the prompt."""
        out = self.programs["prefill"](**self.samples["prefill"] | {"input_ids": ids[:, :PROMPT]})
        logits = [out.logits]
        for i in range(PROMPT, ids.shape[1]):
            inputs = {"input_ids": ids[:, i : i + 1], self.cache: out[self.cache]}
            if "position_ids" in self.samples["decode"]:
                inputs["position_ids"] = torch.full((len(ids), 1), i)
            if isinstance(self.samples["decode"].get("attention_mask"), Tensor):
                inputs["attention_mask"] = torch.ones(len(ids), i + 1, dtype=torch.long)
            out = self.programs["decode"](**self.samples["decode"] | inputs)
            logits.append(out.logits)
        return torch.cat(logits, dim=1)


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=str)
def test_prefill_and_steps_chain(variant: str, static: bool, dtype: torch.dtype) -> None:
    model = exportable(variant, dtype)
    ids = tokens(2, LENGTH, seed=1)
    expected = model(ids, use_cache=False).logits
    assert_close(Chain(model, static).feed(ids), expected, TOLERANCE[dtype])


@torch.no_grad()
def one_by_one(program: Any, ids: Tensor) -> Tensor:
    steps = [program(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=str)
def test_executorch_recipe(variant: str, dtype: torch.dtype) -> None:
    """Twice: the second sequence begins where nothing of the first may be seen."""
    model = exportable(variant, dtype)
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": ROOM}
    program = convert_and_export_with_cache(model, strict=False).module()
    for seed in (1, 2):
        ids = tokens(1, LENGTH, seed=seed)
        assert_close(one_by_one(program, ids), model(ids, use_cache=False).logits, TOLERANCE[dtype])


def test_executorch_program_with_its_state_as_buffers_is_lowered() -> None:
    model = exportable("pro", torch.float32)
    model.set_attn_implementation("eager")
    model.generation_config.cache_implementation = "static"
    recipe = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=ROOM)
    for i, layer in enumerate(recipe.static_cache.layers):
        for j, state in enumerate([*layer.gates, *layer.unshifted.values()]):
            recipe.register_buffer(f"state_{i}_{j}", state, persistent=False)
    example = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
    with torch.no_grad():
        program = torch.export.export(recipe, (), example, strict=True).run_decompositions({}).module()
    ids = tokens(1, LENGTH, seed=1)
    assert_close(one_by_one(program, ids), model(ids, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize("implementation", ["fox", "eager"])
@pytest.mark.parametrize("variant", ["pro", "llama-rope"])
def test_any_number_of_sequences_and_tokens(variant: str, implementation: str) -> None:
    """Without a cache, with padding: one program."""
    model = exportable(variant, torch.float32)
    model.set_attn_implementation(implementation)

    def inputs(batch: int, length: int) -> dict[str, Any]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, 0] = 0
        return {"input_ids": tokens(batch, length), "attention_mask": mask, "use_cache": False}

    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=1024)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs(2, 9), dynamic_shapes=shapes, strict=False).module()
        for batch, length in ((2, 2), (1, 17), (3, 200)):
            given = inputs(batch, length)
            assert_close(program(**given).logits, model(**given).logits, 1e-5)
