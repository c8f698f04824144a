"""The pruning report: its numbers are the model's, its check finds a broken bound, its page needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from foxlm import FoxForCausalLM, FoxPagedCache
from foxlm.cli import app
from foxlm.conversion.graft import graft
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.evaluation.flops import forward_flops, shares_of_flops
from foxlm.evaluation.gates import RULES, first_read, kept_from
from foxlm.evaluation.pruning_report import measure as measuring
from foxlm.evaluation.pruning_report.dropped import ProvenBounds, choose_rows, log_dropped
from foxlm.evaluation.pruning_report.page import render
from foxlm.evaluation.pruning_report.run import Options, read_report, run_report
from foxlm.evaluation.pruning_report.summary import KIND, SCHEMA, choose_heads, jsonable
from foxlm.evaluation.recording import AttentionInputs, record_attention
from foxlm.kernels.pruning.rules import Rule
from foxlm.kernels.tiles import PRUNED_KEYS
from foxlm.modeling.cache.paged import PagedForgettingLayer
from foxlm.modeling.layers.block import FoxDecoderLayer
from models import tiny_model, tokens

EPS = math.exp(-10.0)
LENGTH = 420


def spread_model(variant: str = "pro", **overrides: Any) -> FoxForCausalLM:
    """Heads that forget within a token, and others that hardly do; large weights, so that logits count."""
    model = tiny_model(variant, acp_eps=EPS, acp_rule="tight", **overrides)
    with torch.no_grad():
        for attention in attention_layers(model):
            bias = attention.forget_gate.bias
            bias.copy_(torch.linspace(-1.0, 4.0, len(bias)))
    return model


def attention_layers(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def saved(folder: Path, model: Any, tokenizer: bool = False) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = spread_model(vocab_size=258, dtype=torch.float32)
    return saved(tmp_path_factory.mktemp("bytes") / "model", model, tokenizer=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Forgetting <b>é€</b> & http://example.org/ remembers.\n" * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(byte_model: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole report, by the command itself."""
    out = tmp_path_factory.mktemp("report")
    done = invoke("report", byte_model, "--text", text, "--length", LENGTH, "--rows", 2, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def recorded(model: Any, ids: Tensor) -> list[AttentionInputs]:
    with torch.no_grad(), record_attention(model) as layers:
        model(ids, use_cache=False)
    return layers


def plan(rule: Rule = "tight", length: int = LENGTH, **overrides: Any) -> measuring.Plan:
    fields: dict[str, Any] = {
        "log_eps": (-5.0, -10.0, -15.0),
        "own": 1,
        "rule": rule,
        "lengths": (length // 4, length),
        "cache_lengths": (length,),
    }
    return measuring.Plan(**(fields | overrides))


def test_streamed_layers_are_the_recorded_ones() -> None:
    model = spread_model()
    ids = tokens(1, 150)
    kept = recorded(model, ids)
    taken: list[AttentionInputs] = []
    with torch.no_grad(), record_attention(model, taken.append) as layers:
        model(ids, use_cache=False)
    assert layers == [] and [x.layer for x in taken] == [0, 1]
    for one, other in zip(taken, kept, strict=True):
        for name in ("q", "k", "v", "log_f", "logit_bound"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.scale, one.centers) == (other.scale, other.centers)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "variant", ["pro", "llama", "rope", "key-value-gates", "bias-only", "fixed", "olmo", "sink", "rope-sink"]
)
def test_no_row_loses_more_than_is_proven(variant: str, rule: Rule) -> None:
    """Every row of every head, against weights from the model's own eager attention; something is dropped."""
    model = spread_model(variant)
    ids = tokens(1, 300)
    if model.config.sink_token_id is not None:
        ids[0, 0] = model.config.sink_token_id
    layers = recorded(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    dropping = 0
    for layer, weights in zip(layers, attentions, strict=True):
        firsts = torch.stack([kept_from(layer, -10.0, rule)[0], first_read(layer, -10.0, rule)[0]])
        bounds = ProvenBounds(layer)
        rows = torch.arange(300).expand(4, -1)
        for first, lost in zip(firsts, log_dropped(layer, bounds, rows, firsts), strict=True):
            expected = (weights[0] * (torch.arange(300) < first[..., None])).sum(-1)
            large = expected > 1e-12
            torch.testing.assert_close(lost.exp()[large], expected[large], rtol=1e-6, atol=0.0)
            assert (lost.exp()[~large] <= 1.1e-12).all()
            proven = bounds.of(rule, first)
            assert (lost <= proven).all() and (proven <= -10.0).all()
            dropping += int((lost > -math.inf).sum())
    assert dropping > 100


def test_weights_below_any_number_are_told_apart() -> None:
    model = spread_model()
    with torch.no_grad():
        for attention in attention_layers(model):
            attention.forget_gate.bias.fill_(-8.0)
    layer = recorded(model, tokens(1, 300))[0]
    first = (torch.arange(300) - 200).clamp(min=0).expand(4, -1)
    (lost,) = log_dropped(layer, ProvenBounds(layer), torch.full((4, 1), 299), first[None])
    assert (lost < -1000.0).all() and lost.isfinite().all()


@pytest.mark.parametrize("variant", ["pro", "llama"])
def test_what_tiles_read_is_what_attention_searches(variant: str) -> None:
    for layer in recorded(spread_model(variant), tokens(1, 333)):
        for rule in RULES:
            kept = kept_from(layer, -5.0, rule)
            read = [block.amin(-1, keepdim=True).expand_as(block) // 64 * 64 for block in kept.split(128, dim=-1)]
            assert torch.equal(torch.cat(read, dim=-1), first_read(layer, -5.0, rule))
            assert kept.max() > PRUNED_KEYS


def test_rows_are_drawn_from_everywhere_and_the_worst_are_added() -> None:
    bound = torch.full((2, 1000), -math.inf, dtype=torch.float64)
    bound[0, 17], bound[1, 981] = -10.5, -10.1
    rows = choose_rows(torch.stack([bound, bound.flip(1)]), spread=50, adversarial=1, seed=0)
    assert rows.shape == (2, 52)
    assert torch.equal(rows[:, :50] // 20, torch.arange(50).expand(2, -1))
    assert rows[:, 50:].tolist() == [[17, 982], [981, 18]]
    assert torch.equal(choose_rows(torch.zeros(1, 2, 300), 1000, 1, 0), torch.arange(300).expand(2, -1))


def test_check_finds_a_bound_that_is_broken(
    byte_model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a search that takes all logits for zero. The command says so and exits with 1."""

    def without_logits(layer: AttentionInputs, log_eps: float, rule: Rule) -> Tensor:
        return kept_from(layer._replace(q=layer.q * 0.0, logit_bound=torch.zeros(1)), log_eps, rule)

    monkeypatch.setattr(measuring, "kept_from", without_logits)
    done = invoke("report", byte_model, "--text", text, "--length", 300, "--out", tmp_path)
    assert done.exit_code == 1
    assert "error: THE BOUND IS VIOLATED" in done.stderr
    found = read_report(tmp_path)["check"]
    assert not found["passed"] and found["violations"] > 0
    assert any(case["violations"] and case["largest"] > case["log_eps"] for case in found["cases"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "THE BOUND IS VIOLATED" in page and "The bound holds" not in page


def test_what_is_no_number_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = recorded(spread_model(), tokens(1, 200))[0]
    for name in ("q", "k"):
        bad = layer._replace(**{name: getattr(layer, name).clone().index_fill_(1, torch.tensor(7), math.nan)})
        with pytest.raises(ValueError, match=r"layer 0: (queries|keys) are not finite"):
            measuring.measure(bad, None, plan(length=200))
    monkeypatch.setattr(
        measuring, "log_dropped", lambda layer, bounds, rows, firsts: rows * torch.full((len(firsts), 1, 1), math.nan)
    )
    found = measuring.measure(layer, None, plan(length=200))
    assert all((one.violations > 0).all() for one in found.cases.values())


def test_shares_are_those_counted_by_hand() -> None:
    layer = recorded(spread_model(), tokens(1, 256))[0]
    found = measuring.measure(layer, None, plan(length=256))
    for rule in RULES:
        kept = kept_from(layer, -10.0, rule)[0]
        pairs = kept.double().sum(-1) / (256 * 257 / 2)
        np.testing.assert_allclose(found.cases["pairs", rule].skipped[1], pairs, rtol=1e-12)
        np.testing.assert_allclose(found.cases["pairs", rule].by_length[1], pairs, rtol=1e-12)
        read = first_read(layer, -10.0, rule)[0, :, ::128] // 64
        np.testing.assert_allclose(found.cases["tiles", rule].skipped[1], read.double().sum(-1) / (2 + 4), rtol=1e-12)
        prefix = layer._replace(q=layer.q[:, :64], k=layer.k[:, :64], log_f=layer.log_f[:, :64])
        kept = kept_from(prefix, -10.0, rule)[0]
        np.testing.assert_allclose(
            found.cases["pairs", rule].by_length[0], kept.double().sum(-1) / (64 * 65 / 2), rtol=1e-12
        )
    assert found.cases["pairs", "tight"].skipped.max() > 0.5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", ["pro", "multi-query", "key-value-gates", "llama", "olmo"])
def test_held_pages_are_those_of_the_cache(variant: str, rule: Rule) -> None:
    model = spread_model(variant)
    model.config.acp_rule = rule
    with torch.no_grad():
        for attention in attention_layers(model):
            attention.forget_gate.bias.sub_(3.0)
    ids, freed = tokens(1, LENGTH), 0
    for length in (200, LENGTH):
        cache = FoxPagedCache(model.config, LENGTH)
        with torch.no_grad():
            model(ids[:, :length], cache=cache)
        layers = recorded(model, ids)
        for layer, block, cached in zip(layers, model.model.layers, cache.layers, strict=True):
            bounds = cast(FoxDecoderLayer, block).logit_bounds(torch.float64)
            pages = measuring.held_pages(layer, bounds, (length,), EPS, rule, LENGTH)
            held = cast(PagedForgettingLayer, cached)
            assert pages.tolist() == (held.pages[0] >= 0).sum(-1)[None].tolist()
            page = held.keys[0].nbytes + held.values[0].nbytes + held.c[0].nbytes
            assert measuring.page_bytes(layer) == page
            freed += int(held.start.sum())
    assert freed > 0 or variant == "llama"


def test_operations_are_counted_and_ratios_follow() -> None:
    model = tiny_model("llama")
    found = forward_flops(model.config, 100)
    weights = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 32 * 97
    gates = 2 * 32 * 4 if any(isinstance(x.forget_gate, torch.nn.Linear) for x in attention_layers(model)) else 0
    assert found["linear"] == 2 * 100 * (weights + gates)
    assert found["attention"] == 2 * 4 * 4 * 8 * 100 * 100 / 2
    shares = shares_of_flops({"linear": 3.0, "attention": 1.0}, kept=0.25)
    assert shares["forward"] == {"attention_share": 0.25, "left": 3.25 / 4.0, "speedup": 4.0 / 3.25}
    assert shares["forward_backward"]["left"] == pytest.approx((9.0 + 0.25 * 3.5) / 12.5)


def test_report_agrees_with_itself(report: Path) -> None:
    found = read_report(report)
    model, settings, check, cache = (found[name] for name in ("model", "settings", "check", "cache"))
    shape = (model["layers"], model["heads"])
    assert np.shape(found["gates"]["decay_times"]) == shape
    own = settings["own"]
    assert settings["log_eps"][own] == pytest.approx(-10.0)
    for grain in ("pairs", "tiles"):
        for rule in RULES:
            shares = np.array(found["skipped"][grain][rule], dtype=float)
            assert shares.shape == (len(settings["log_eps"]), *shape)
            assert (np.diff(shares, axis=0) <= 0).all() and ((shares >= 0) & (shares < 1)).all()
            by_length = found["by_length"][grain][rule]
            assert by_length[-1] == pytest.approx(shares[own].mean(), rel=1e-4)
    pairs, tiles = (np.array(found["skipped"][grain]["tight"]) for grain in ("pairs", "tiles"))
    assert pairs.mean() > tiles.mean() > 0.0
    # Pages of all heads together are the bytes in all.
    assert np.sum(cache["pages"]) * cache["page_bytes"] == pytest.approx(cache["held_bytes"][-1], rel=1e-4)
    heads = model["layers"] * model["kv_heads"]
    assert cache["full_pages"] * heads * cache["page_bytes"] == pytest.approx(cache["full_bytes"][-1], rel=1e-4)
    assert cache["held_bytes"][-1] < cache["full_bytes"][-1]
    assert check["passed"] and check["violations"] == sum(case["violations"] for case in check["cases"]) == 0
    assert check["rows"] > 2 * 128 * math.prod(shape)
    assert len(check["cases"]) == 4 * len(settings["log_eps"])
    assert all(float(case["largest"]) <= case["log_eps"] for case in check["cases"])
    assert max(float(case["largest"]) for case in check["cases"]) > -50.0
    kept = 1.0 - tiles[own].mean()
    assert found["cost"]["kept"] == pytest.approx(kept, rel=1e-3)
    assert found["run"]["device"] and found["run"]["commit"]


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & page.tags
    assert len(page.addresses) >= 9 and all(one.startswith("data:image/svg+xml;base64,") for one in page.addresses)
    assert "viewport" in text and "@import" not in text and "url(" not in text
    for part in (
        "The bound holds",
        "Forget gates",
        "What pruning skips",
        "really dropped",
        "each token keeps",
        "evicting cache",
    ):
        assert part in text
    # Markup in a name is text.
    found = read_report(report)
    found["model"]["source"] = found["settings"]["text"] = "<b>mine</b>"
    assert render(found).count("&lt;b&gt;mine") >= 3 and "<b>mine" not in render(found)
    assert not re.search(r"\bnan\b|\bNone\b", re.sub(r"base64,[^\"]*", "", text))


def test_page_is_drawn_anew_from_its_json(report: Path, tmp_path: Path) -> None:
    before = (report / "report.html").read_bytes()
    (tmp_path / "report.json").write_bytes((report / "report.json").read_bytes())
    done = invoke("report", "--redraw", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_bytes() == before


def test_measuring_needs_no_matplotlib(
    byte_model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foxlm.evaluation.requirements.find_spec", lambda name: None)
    done = invoke("report", byte_model, "--text", text, "--length", 128, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "--redraw" in done.output and sorted(x.name for x in tmp_path.iterdir()) == ["report.json"]


def test_what_is_measured_is_reported_beside_the_bounds(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", spread_model("llama", dtype=torch.float32))
    np.save(tmp_path / "tokens.npy", tokens(1, 400).numpy())
    found = run_report(Options(source, tmp_path / "tokens.npy", tmp_path / "out", rule="measured", sampled=20))
    for grain in ("pairs", "tiles"):
        bound, measured = (np.array(found["skipped"][grain][rule], dtype=float) for rule in ("tight", "measured"))
        assert (measured >= bound).all() and measured.mean() > bound.mean()
    cases = [case for case in found["check"]["cases"] if case["rule"] == "measured"]
    assert len(cases) == 2 * len(found["settings"]["log_eps"]) and found["check"]["passed"]


@pytest.mark.parametrize("variant", ["llama", "key-value-gates", "fixed", "multi-query", "post-norm", "rope-sink"])
def test_every_kind_of_model_is_reported(variant: str, tmp_path: Path) -> None:
    """From token numbers, without a tokenizer: all but the text's own part."""
    source = saved(tmp_path / "model", spread_model(variant, dtype=torch.float32))
    ids = tokens(1, 200)
    # The token that sinks stand for, where there are some.
    ids[0, 0] = 1
    np.save(tmp_path / "tokens.npy", ids.numpy())
    found = run_report(Options(source, tmp_path / "tokens.npy", tmp_path / "out", rule="paper", sampled=20))
    assert found["settings"]["length"] == 200 and found["settings"]["rule"] == "paper"
    assert found["check"]["passed"] and found == read_report(tmp_path / "out")


def test_grafted_models_are_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    fox: Any = graft(LlamaForCausalLM(config), decay_times=(0.5, 100.0))
    with torch.no_grad():
        for attention in attention_layers(fox):
            attention.forget_gate.bias[-1] = 1e4
    np.save(tmp_path / "tokens.npy", tokens(1, 256).numpy())
    source = saved(tmp_path / "model", fox)
    found = run_report(Options(source, tmp_path / "tokens.npy", tmp_path / "out"))
    assert found["check"]["passed"] and found["model"]["rope"] and found["model"]["qk_norm"] == "none"
    assert found["gates"]["decay_times"][0][-1] == "inf"
    assert np.array(found["skipped"]["tiles"]["tight"])[:, :, -1].max() == 0.0
    done = invoke("report", "--redraw", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "What it saves" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_wrong_input_is_refused_in_one_line(byte_model: str, text: Path, report: Path, tmp_path: Path) -> None:
    gateless = saved(tmp_path / "gateless", tiny_model("gateless", dtype=torch.float32))
    llama = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    other = saved(tmp_path / "llama", LlamaForCausalLM(llama))
    (tmp_path / "empty.txt").write_text("")
    np.save(tmp_path / "large.npy", np.full(300, 258))
    new = ("--out", tmp_path / "new")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((gateless, "--text", text, *new), r"has no forget gates \(forget_gate='none'\)"),
        ((other, "--text", text, *new), "is a llama model without forget gates"),
        ((byte_model, "--text", tmp_path / "none.txt", *new), "does not exist"),
        ((byte_model, "--text", tmp_path / "empty.txt", *new), "at least 128 are needed"),
        (
            (byte_model, "--text", tmp_path / "large.npy", *new),
            r"--text must hold tokens in \[0, 258\)",
        ),
        ((byte_model, "--text", text, "--length", 10**6, *new), "has no 1000000 tokens in a row"),
        ((byte_model, "--text", text, "--length", 100, *new), "--length must be at least 128"),
        ((byte_model, "--text", text, "--seed", -1, *new), "--seed must be in"),
        ((byte_model, "--text", text, "--rows", 0, *new), "--rows must be a positive integer, got 0"),
        ((byte_model, "--text", text, "--eps", "0", *new), "--eps must be positive for this report, got 0"),
        ((byte_model, "--text", text, "--eps", "2", *new), "eps must be"),
        (
            (byte_model, "--text", text, "--rule", "loose", *new),
            "rule must be paper, tight, measured or model, got 'loose'",
        ),
        ((byte_model, "--text", text, "--out", report), "--overwrite replaces it"),
        ((byte_model, "--text", text, "--out", text), "--out must be a folder"),
        ((byte_model,), "MODEL and --text are needed"),
        (("--redraw", tmp_path), "report.json"),
        (("--redraw", text), "is not JSON"),
        ((byte_model, "--redraw", report), "--redraw measures nothing: leave out model"),
    ]
    for arguments, message in cases:
        done = invoke("report", *arguments)
        assert done.exit_code == 1, arguments
        assert re.search(message, done.stderr), done.stderr
        assert not (tmp_path / "new").exists()


def test_heads_of_each_kind_are_chosen() -> None:
    assert choose_heads(np.array([[1.0, 2.0], [math.inf, 3.0]])) == [("fast", 0, 1), ("slowest", 1, 0)]
    assert choose_heads(np.array([[5.0]])) == [("slowest", 0, 0)]
    kinds = choose_heads(np.arange(1.0, 13.0).reshape(3, 4))
    assert [kind for kind, *_ in kinds] == ["fast", "medium", "slowest"] and kinds[-1][1:] == (2, 3)


def test_json_has_no_numbers_that_json_has_not() -> None:
    found = jsonable({"a": np.array([1.0, -math.inf]), "b": (math.nan, 3), "c": np.float64(1.23456789)})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"a": [1.0, "-inf"], "b": ["nan", 3], "c": 1.2346}


def test_damaged_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"kind": KIND, "schema": SCHEMA}))
    done = CliRunner().invoke(app, ["report", "--redraw", str(tmp_path)])
    assert done.exit_code == 1
    assert "is damaged (KeyError" in done.output
