"""What differs between versions of transformers: both names of the cache, and versions out of the range."""

import configparser
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from foxlm import FoxForCausalLM, FoxForSequenceClassification, FoxForTokenClassification, FoxModel, FoxPagedCache
from foxlm.modeling import versions as versions_fox
from foxlm.modeling.versions import CACHE, CACHE_NAMES, NEWEST, OLDEST, cache_of, check_transformers
from models import assert_close, tiny_model, tokens
from without_foxlm import run_without

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.versions,
    # transformers warns of the older name from 5.24 on, as its own models do.
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("model_class", [FoxModel, FoxForCausalLM, FoxForTokenClassification])
def test_each_name_of_the_cache_is_taken(model_class: Any, name: str) -> None:
    model, ids = tiny_model(model_class=model_class), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    parts = [model(part, **{name: cache})[0] for part in ids.split([4, 1, 4], dim=1)]
    assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False)[0])
    assert cache.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_each_name_of_the_cache_is_taken_by_generate(name: str) -> None:
    model, ids = tiny_model(), tokens(1, 5)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    cache = FoxPagedCache(model.config, 32)
    out = model.generate(ids, return_dict_in_generate=True, **greedy, **{name: cache})
    assert torch.equal(out.sequences, model.generate(ids, use_cache=False, **greedy))
    assert cache_of(out) is cache and cache.get_seq_length() == 9


def test_the_cache_by_both_names_is_refused() -> None:
    model, ids = tiny_model(), tokens(1, 5)
    both = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names"):
            call(ids, **both)


def test_the_older_name_is_deprecated_where_transformers_deprecates_it() -> None:
    model = tiny_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(tokens(1, 5), past_key_values=DynamicCache(config=model.config))
    assert any("`past_key_values` is deprecated" in str(x.message) for x in caught) == (CACHE == "cache")


def test_outputs_hold_the_cache_under_the_name_that_transformers_reads() -> None:
    for model_class in (FoxModel, FoxForCausalLM, FoxForSequenceClassification):
        model = tiny_model(model_class=model_class)
        out = model(tokens(1, 4), use_cache=True)
        assert out[CACHE].get_seq_length() == cache_of(out).get_seq_length() == 4
        assert CACHE not in model(tokens(1, 4), use_cache=False)


def test_trainer_predicts_logits_alone(tmp_path) -> None:
    model = tiny_model(dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in tokens(3, 6)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    predicted = Trainer(model, arguments).predict(rows).predictions
    assert predicted.shape == (3, 6, model.config.vocab_size)


@torch.no_grad()
def test_a_forward_that_makes_its_own_cache_compiles() -> None:
    # Of sizes that no other test has: caches of a kind are registered once in a process.
    model, ids = tiny_model(num_attention_heads=6, num_key_value_heads=3), tokens(1, 5)
    step = torch.compile(lambda x: model(x, use_cache=True).logits, backend="eager", fullgraph=True)
    assert_close(step(ids), model(ids, use_cache=False).logits)


def test_static_caches_say_that_they_cannot_be_cropped() -> None:
    """From 5.24 on those of transformers can; its assisted decoding asks them, and FoX would lose its gates."""
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(1, 5), cache=cache)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="static cache of FoX cannot be cropped"):
        cache.layers[0].crop(-1)
    with pytest.raises((ValueError, NotImplementedError), match=r"crop|[Ss]tatic"):
        model.generate(tokens(1, 5), prompt_lookup_num_tokens=2, cache_implementation="static", max_new_tokens=5)


# Versions out of the range


def test_the_range_is_that_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line]
    allowed = next(x.specifier for x in needed if x.name == "transformers")
    assert f">={OLDEST}," in f"{allowed},", f"setup.cfg asks for {allowed}, versions_fox.py for {OLDEST} or newer"
    assert f"{NEWEST}.0" in allowed
    pins = [
        Requirement(x) for x in (ROOT / "requirements.txt").read_text().split("\n") if x.startswith("transformers=")
    ]
    pinned = {pin.version for x in pins for pin in x.specifier}
    assert f"{OLDEST}.0" in pinned, "Python 3.10 gets the oldest version, which is so tried"
    for version in pinned:
        assert Version(OLDEST) <= Version(version) < Version(f"{NEWEST}.999")


LOADS = {
    "package": "import foxlm",
    "own code": "AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True)",
}


@pytest.mark.parametrize("load", LOADS)
def test_versions_out_of_the_range_are_named(load: str, tmp_path: Path) -> None:
    """By foxlm and by the code of a published model, which may meet any version."""
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    newer = f"{NEWEST.partition('.')[0]}.99.0"
    code = f"""
import io, logging, transformers
from transformers import AutoModelForCausalLM
shown = io.StringIO()
logging.basicConfig(stream=shown, level=logging.WARNING)
for version in ("5.16.3", "4.57.6", {newer!r}, {newer!r}):
    transformers.__version__ = version
    try:
        {LOADS[load]}
    except ImportError as error:
        print(error)
print(shown.getvalue())
"""
    said = run_without((), code, tmp_path)
    for version in ("5.16.3", "4.57.6"):
        assert f"FoX needs transformers {OLDEST} to {NEWEST}, got {version}: pip install" in said
    assert said.count(f"tried with transformers {OLDEST} to {NEWEST}, not with {newer}") == 1
    assert f"for transformers {OLDEST} to {NEWEST} " in (tmp_path / "model/modeling_fox.py").read_text().split("\n")[0]


def test_versions_within_the_range_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions_fox.logger, "warning_once", pytest.fail)
    for version in (OLDEST, f"{OLDEST}.0", "5.20.1", NEWEST, f"{NEWEST}.7", f"{NEWEST}.0.dev0"):
        check_transformers(version)
