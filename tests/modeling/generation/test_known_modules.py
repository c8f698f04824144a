"""`generate` looks at a model's modules again only where they have changed, and takes any that it took before."""

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from foxlm.modeling.generation import decoding_mode
from foxlm.modeling.layers import known_modules
from foxlm.modeling.layers.fused_projections import FusableProjections
from models import tiny_model, tokens


def test_unchanged_modules_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = tiny_model("pro"), []
    init = known_modules.KnownModules.__init__

    def noted(self: known_modules.KnownModules, root: torch.nn.Module) -> None:
        looked.append(root)
        init(self, root)

    monkeypatch.setattr(known_modules.KnownModules, "__init__", noted)
    for _ in range(3):
        model.generate(tokens(1, 8), max_new_tokens=2)
    assert looked == [model]
    model.model.layers[0].mlp.down_proj.weight.data = model.model.layers[0].mlp.down_proj.weight.detach() * 2.0
    model.generate(tokens(1, 8), max_new_tokens=2)
    assert looked == [model, model]
    handle = model.model.norm.register_forward_hook(lambda module, args, out: out)
    model.generate(tokens(1, 8), max_new_tokens=2)
    assert model.known is None
    handle.remove()
    cache = DynamicCache(config=model.config)
    expected = model.generate(tokens(1, 8), max_new_tokens=2)
    assert torch.equal(model.generate(tokens(1, 8), max_new_tokens=2, past_key_values=cache), expected)


def test_calls_that_overlap_leave_the_switch_as_it_was() -> None:
    """Two threads may generate with one model, and the first to begin may be the first to end."""
    model = tiny_model("pro")
    model.generate(tokens(1, 8), max_new_tokens=1)
    first, second = (decoding_mode(model, model.known) for _ in range(2))
    for enter in (first.__enter__, second.__enter__):
        enter()
    for leave in (first.__exit__, second.__exit__):
        leave(None, None, None)
    uses = {x.uses_fused for x in model.modules() if isinstance(x, FusableProjections)}
    assert uses == {"never"}


@pytest.mark.parametrize("what", ["a tensor", "an array", "a sparse weight", "a sparse buffer"])
def test_generate_with_what_cannot_be_compared(what: str) -> None:
    model = tiny_model("pro", dtype=torch.float32)
    model.scale = 1.0
    model.generate(tokens(1, 8), max_new_tokens=1)
    layer = model.model.layers[0]
    if what == "a tensor":
        model.scale = torch.ones(3)
    elif what == "an array":
        model.scale = np.zeros(3)
    elif what == "a sparse weight":
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.detach().to_sparse_csr())
    else:
        model.register_buffer("index", torch.eye(3).to_sparse())
    assert model.generate(tokens(1, 8), max_new_tokens=2).shape == (1, 10)
