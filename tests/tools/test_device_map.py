"""Models spread over devices by `device_map`, parts of them on disk, generate what they do in one place."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foxlm import FoxForCausalLM
from models import assert_close, tiny_model, tokens

SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
SPLIT |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


@pytest.fixture(scope="module", params=["pro", "rope"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, dtype=torch.float32, num_hidden_layers=3).save_pretrained(path)
    return path


def load(folder: Path, device_map: Any, offload: Path, **options: Any) -> Any:
    return FoxForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("how", ["split", "auto"])
def test_a_split_model_generates_the_same(folder: Path, tmp_path: Path, how: str) -> None:
    whole = FoxForCausalLM.from_pretrained(folder).eval()
    if how == "split":
        model = load(folder, SPLIT, tmp_path)
    else:
        model = load(folder, "auto", tmp_path, max_memory={"cpu": 50_000})
    assert "disk" in model.hf_device_map.values() and len(set(model.hf_device_map.values())) > 1
    assert any(weight.is_meta for weight in model.parameters())
    rows = tokens(2, 9)
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    assert_close(model(rows, attention_mask=mask).logits, whole(rows, attention_mask=mask).logits, 1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(rows, **options, **cache), whole.generate(rows, **options, **cache)), cache
    for each in (model, whole):
        each.config.free_dead_cache = True
    assert torch.equal(model.generate(rows, **options), whole.generate(rows, **options))
