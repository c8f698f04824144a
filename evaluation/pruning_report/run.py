"""``foxlm report``: measure a FoX model's gates and pruning on real text, and write the report."""

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foxlm.kernels.argument_types import typed
from foxlm.kernels.pruning.rules import Rule
from foxlm.kernels.tiles import PRUNED_QUERIES
from foxlm.modeling.configuration_fox import DEFAULT_EPS, FoxConfig
from foxlm.modeling.layers.block import FoxDecoderLayer
from foxlm.modeling.model_files import read_config

from ..flops import forward_flops, shares_of_flops
from ..loading import load_model, load_tokenizer, model_name
from ..provenance import provenance
from ..recording import AttentionInputs, record_attention
from ..requirements import require
from ..results import parse_json, reading, require_folder, write_whole
from ..text import check_tokens, documents, rows
from .measure import Findings, Plan, measure
from .summary import KIND, SCHEMA, jsonable, summarize

JSON_NAME, PAGE_NAME = "report.json", "report.html"
# Natural logs of eps at which all is measured, beside the model's own.
CURVE = (-5.0, -10.0, -15.0, -20.0)
DEFAULT_LENGTH = 2048
_PREFIXES = (8, 4, 2, 1)
_CACHE_POINTS = 24
_SHOWN_QUERIES = 300
_CONFIGURATION = ("hidden_size", "qk_norm", "forget_gate", "forget_gate_heads", "acp_eps", "acp_rule")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        model: folder, or name on the Hugging Face Hub.
        text: as `documents` takes it.
        out: folder for ``report.json`` and ``report.html``.
        length: tokens of a row of text; None takes up to `DEFAULT_LENGTH`, as the text has them.
        rows: how many of them.
        join: as `rows` takes it.
        eps, rule, device, dtype: as `load_model` takes them.
        sampled: rows of attention of each head and row of text that are checked, beside those chosen as the worst.
        seed: of those rows.
        overwrite: whether an earlier report is replaced.
    """

    model: str
    text: Path
    out: Path = Path("foxlm-report")
    length: int | None = None
    rows: int = 1
    join: bool = False
    eps: str = "model"
    rule: str = "model"
    device: str = "auto"
    dtype: str = "auto"
    sampled: int = 128
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.length is not None and self.length < PRUNED_QUERIES:
            raise ValueError(f"length must be at least {PRUNED_QUERIES}, a block of queries, got {self.length}")
        for name, value in (("rows", self.rows), ("sampled", self.sampled)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if not self.text.exists():
            raise ValueError(f"text must be a file or a folder, {self.text} does not exist")
        require_folder(self.out)
        if (self.out / JSON_NAME).exists() and not self.overwrite:
            raise ValueError(
                f"{self.out} holds a report already; --overwrite replaces it, another --out leaves it there"
            )


@typed
def run_report(options: Options) -> dict[str, Any]:
    """Measure, and write ``report.json`` into ``options.out``; drawing is another step (`draw`).

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: the model has no forget gates, the text is too short, or an option is wrong.
        OSError: something cannot be read or written.
    """
    began = time.monotonic()
    _require_gates(options.model)
    tokenizer = None
    # Token numbers need none; text without one is refused where it is read.
    with suppress(ValueError):
        tokenizer = load_tokenizer(options.model)
    length = _length(options, tokenizer)
    texts = list(rows(options.text, tokenizer, length, options.rows, options.join))
    model = load_model(options.model, device=options.device, dtype=options.dtype, eps=options.eps, rule=options.rule)
    eps, rule = model.config.acp_eps, model.config.acp_rule
    if eps is None and options.eps != "model":
        raise ValueError(f"eps must be positive for this report, got {options.eps}")
    eps = DEFAULT_EPS if eps is None else eps
    low, high = min(int(x.min()) for x in texts), max(int(x.max()) for x in texts)
    check_tokens(low, high, model.config.vocab_size, "text")
    # Now, not when the report is written: a checkout can move on meanwhile.
    run = provenance(str(model.device), options.seed, ("triton",))
    plan = _plan(options, eps, rule, length)
    summary = summarize(_measure(model, texts, plan), plan)
    report = {
        "schema": SCHEMA,
        "kind": KIND,
        "run": run | {"seconds": time.monotonic() - began},
        "model": _model_facts(options.model, model),
        "settings": {
            "text": options.text.name,
            "length": length,
            "rows": len(texts),
            "tokens": length * len(texts),
            "joined": options.join,
            "eps": eps,
            "rule": rule,
            "log_eps": plan.log_eps,
            "own": plan.own,
            "sampled_rows": plan.spread,
            "adversarial_rows": plan.adversarial,
        },
        **summary,
        "cost": _cost(model.config, summary, plan),
    }
    report = jsonable(report)
    write_whole(options.out / JSON_NAME, json.dumps(report, allow_nan=False, separators=(",", ":")) + "\n")
    return report


def _require_gates(source: str) -> None:
    config = read_config(source)
    if not isinstance(config, FoxConfig):
        raise ValueError(f"{source} is a {config.model_type} model without forget gates; foxlm report is for FoX")
    if config.forget_gate == "none":
        raise ValueError(f"{source} has no forget gates (forget_gate='none'): nothing decays or can be pruned")


def _length(options: Options, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if options.length is not None:
        return options.length
    length = 0
    for document in documents(options.text, tokenizer):
        length = length + len(document) if options.join else max(length, len(document))
        if length >= DEFAULT_LENGTH:
            return DEFAULT_LENGTH
    if length < PRUNED_QUERIES:
        raise ValueError(f"{options.text} has {length} tokens in a row, at least {PRUNED_QUERIES} are needed")
    return length


def _plan(options: Options, eps: float, rule: Rule, length: int) -> Plan:
    own = math.log(eps)
    # Instead of the curve's nearest, which it often is: neighbors would hide each other.
    others = [value for value in CURVE if abs(value - own) > 1.5]
    log_eps = tuple(sorted([*others, own], reverse=True))
    return Plan(
        log_eps=log_eps,
        own=log_eps.index(own),
        rule=rule,
        lengths=tuple(sorted({max(1, length // part) for part in _PREFIXES})),
        cache_lengths=tuple(sorted({-(-length * (i + 1) // _CACHE_POINTS) for i in range(_CACHE_POINTS)})),
        spread=options.sampled,
        seed=options.seed,
        shown=np.unique(np.linspace(0, length - 1, min(length, _SHOWN_QUERIES)).astype(np.int64)),
    )


@torch.no_grad()
def _measure(model: PreTrainedModel, texts: list[np.ndarray], plan: Plan) -> list[list[Findings]]:
    """Findings of each text and layer. A layer's tensors are gone before the next one's are there."""
    base = model.base_model
    bounds = [cast(FoxDecoderLayer, layer).logit_bounds(model.dtype) for layer in base.layers]
    findings: list[list[Findings]] = []

    def take(layer: AttentionInputs) -> None:
        findings[-1].append(measure(layer, bounds[layer.layer], plan))
        bar.update()

    with tqdm(total=len(texts) * len(bounds), desc="measuring", unit="layer") as bar, record_attention(model, take):
        for text in texts:
            findings.append([])
            base(input_ids=torch.from_numpy(text)[None].to(model.device), use_cache=False)
    return findings


def _model_facts(source: str, model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    heads, kv_heads, head_dim = config.heads
    return {
        "source": model_name(source),
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope": any(config.has_rope(layer) for layer in range(config.num_hidden_layers)),
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in _CONFIGURATION},
    }


def _cost(config: Any, summary: dict[str, Any], plan: Plan) -> dict[str, Any]:
    by_length = []
    for tokens, skipped in zip(plan.lengths, summary["by_length"]["tiles"][plan.rule], strict=True):
        flops = forward_flops(config, tokens)
        by_length.append({"length": tokens, "kept": 1.0 - skipped, **shares_of_flops(flops, 1.0 - skipped)})
    # The last length is the whole text.
    return {"flops": flops, "kept": by_length[-1]["kept"], "by_length": by_length}


def read_report(path: Path) -> dict[str, Any]:
    """What `run_report` wrote to ``path``, ``report.json`` or its folder.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    path = path / JSON_NAME if path.is_dir() else path
    report = parse_json(path)
    if not isinstance(report, dict) or (report.get("kind"), report.get("schema")) != (KIND, SCHEMA):
        raise ValueError(f"{path} must be a report.json of foxlm report, schema {SCHEMA}")
    return report


def draw(report: dict[str, Any], out: Path) -> Path:
    """Draw a report's page into the folder ``out``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report is damaged.
    """
    require("matplotlib")
    from .page import render

    path = out / PAGE_NAME
    with reading(out / JSON_NAME):
        page = render(report)
    write_whole(path, page)
    return path
