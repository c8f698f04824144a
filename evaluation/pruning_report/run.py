"""``foxlm report``: measure a FoX model's gates and pruning on real text, and write the report."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foxlm.conversion.pretrained import read_config
from foxlm.kernels.pruning.rules import Rule
from foxlm.kernels.tiles import PRUNED_QUERIES
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.layers.block import FoxDecoderLayer

from ..flops import forward_flops, shares_of_flops
from ..loading import load_model, load_tokenizer, model_name, pruning_changes
from ..provenance import provenance
from ..recording import AttentionInputs, record_attention
from ..results import parse_json, reading, write_whole
from ..text import check_tokens, documents, rows
from .measure import Findings, Plan, measure
from .summary import KIND, SCHEMA, jsonable, summarize

JSON_NAME, PAGE_NAME = "report.json", "report.html"
# Natural logs of eps at which all is measured, beside the model's own.
CURVE = (-5.0, -10.0, -15.0, -20.0)
# Where a model does not say: below the rounding of bfloat16.
DEFAULT_EPS = math.exp(-10.0)
DEFAULT_LENGTH = 2048
_PREFIXES = (8, 4, 2, 1)
_CACHE_POINTS = 24
_SHOWN_QUERIES = 300

Bounds = list[Any]
"""`LogitBounds` of each layer, or None."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        model: folder, or name on the Hugging Face Hub.
        text: as `documents` takes it.
        out: folder for ``report.json`` and ``report.html``.
        length: tokens of a row of text; None takes up to `DEFAULT_LENGTH`, as the text has them.
        count: rows.
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
    count: int = 1
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
            raise ValueError(f"--length must be at least {PRUNED_QUERIES}, a block of queries, got {self.length}")
        for name, value in (("--rows", self.count), ("--sampled", self.sampled)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in [0, 2**32), got {self.seed}")
        if not self.text.exists():
            raise ValueError(f"--text must be a file or a folder, {self.text} does not exist")
        check_out(self.out, self.overwrite)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse what would be lost.

    Raises:
        ValueError: ``out`` is a file, or a folder with a report that is not to be replaced.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {out}")
    if (out / JSON_NAME).exists() and not overwrite:
        raise ValueError(f"{out} holds a report already; --overwrite replaces it, another --out leaves it there")


def run_report(options: Options) -> dict[str, Any]:
    """Measure, and write ``report.json`` into ``options.out``; drawing is another step (`draw`).

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: the model has no forget gates, the text is too short, or an option is wrong.
        OSError: something cannot be read or written.
    """
    began = time.monotonic()
    eps, rule = _pruned_by(options)
    tokenizer = _tokenizer(options.model)
    length = _length(options, tokenizer)
    texts = list(rows(options.text, tokenizer, length, options.count, options.join))
    model = load_model(options.model, device=options.device, dtype=options.dtype, eps=options.eps, rule=options.rule)
    low, high = min(int(x.min()) for x in texts), max(int(x.max()) for x in texts)
    check_tokens(low, high, model.config.vocab_size, "--text")
    # Now, not when the report is written: a checkout can move on meanwhile.
    run = provenance(str(model.device), options.seed, ("triton",))
    plan = _plan(options, eps, rule, length)
    findings = _measure(model, texts, plan)
    report: dict[str, Any] = {"schema": SCHEMA, "kind": KIND, "run": run, "model": _model_facts(options.model, model)}
    report["settings"] = {
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
    }
    report |= summarize(findings, plan)
    report["cost"] = _cost(model, report)
    report["run"]["seconds"] = time.monotonic() - began
    options.out.mkdir(parents=True, exist_ok=True)
    report = jsonable(report)
    write_whole(options.out / JSON_NAME, json.dumps(report, allow_nan=False, separators=(",", ":")) + "\n")
    return report


def _pruned_by(options: Options) -> tuple[float, Rule]:
    """``eps`` and ``rule`` that the report looks at closely."""
    config = read_config(options.model)
    if not isinstance(config, FoxConfig):
        raise ValueError(
            f"{options.model} is a {config.model_type} model without forget gates; foxlm report is for FoX"
        )
    if config.forget_gate == "none":
        raise ValueError(f"{options.model} has no forget gates (forget_gate='none'): nothing decays or can be pruned")
    changes = pruning_changes(options.eps, options.rule)
    if "acp_eps" in changes and changes["acp_eps"] is None:
        raise ValueError(f"--eps must be positive for this report, got {options.eps}")
    eps = changes.get("acp_eps", config.acp_eps)
    return DEFAULT_EPS if eps is None else float(eps), cast(Rule, changes.get("acp_rule", config.acp_rule))


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(source)
    except ValueError:
        # Token numbers need none; text without one is refused where it is read.
        return None


def _length(options: Options, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if options.length is not None:
        return options.length
    longest = total = 0
    for document in documents(options.text, tokenizer):
        longest, total = max(longest, len(document)), total + len(document)
        if (total if options.join else longest) >= DEFAULT_LENGTH:
            return DEFAULT_LENGTH
    length = total if options.join else longest
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
        room=length,
        spread=options.sampled,
        seed=options.seed,
        shown=np.unique(np.linspace(0, length - 1, min(length, _SHOWN_QUERIES)).astype(np.int64)),
    )


@torch.no_grad()
def _measure(model: PreTrainedModel, texts: list[np.ndarray], plan: Plan) -> list[list[Findings]]:
    """Findings of each text and layer. A layer's tensors are gone before the next one's are there."""
    base = model.base_model
    bounds: Bounds = [cast(FoxDecoderLayer, layer).logit_bounds(model.dtype) for layer in base.layers]
    findings: list[list[Findings]] = [[] for _ in texts]
    total = len(texts) * len(bounds)
    with tqdm(total=total, desc="measuring", unit="layer") as bar:
        for row, text in enumerate(texts):
            found = findings[row]

            def take(layer: AttentionInputs, found=found, first=row == 0) -> None:
                found.append(measure(layer, bounds[layer.layer], plan, details=first))
                bar.update()

            with record_attention(model, take):
                base(input_ids=torch.from_numpy(text)[None].to(model.device), use_cache=False)
    return findings


def _model_facts(source: str, model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    heads, kv_heads, head_dim = config.heads
    return {
        "source": model_name(source),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "qk_norm": config.qk_norm,
        "rope": any(config.has_rope(layer) for layer in range(config.num_hidden_layers)),
        "forget_gate": config.forget_gate,
        "forget_gate_heads": config.forget_gate_heads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "acp_eps": config.acp_eps,
        "acp_rule": config.acp_rule,
    }


def _cost(model: PreTrainedModel, report: dict[str, Any]) -> dict[str, Any]:
    settings = report["settings"]
    length, rule = settings["length"], settings["rule"]
    kept = 1.0 - float(report["skipped"]["tiles"][rule][settings["own"]].mean())
    flops = forward_flops(model.config, length)
    by_length = []
    for tokens, skipped in zip(report["by_length"]["lengths"], report["by_length"]["tiles"][rule], strict=True):
        shares = shares_of_flops(forward_flops(model.config, tokens), 1.0 - skipped)
        by_length.append({"length": tokens, "kept": 1.0 - skipped, **shares})
    return {"flops": flops, "kept": kept, "by_length": by_length}


def read_report(path: Path) -> dict[str, Any]:
    """What `run_report` wrote.

    Args:
        path: ``report.json``, or its folder.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    path = path / JSON_NAME if path.is_dir() else path
    report = parse_json(path)
    if not isinstance(report, dict) or report.get("kind") != KIND or report.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a report.json of foxlm report, schema {SCHEMA}")
    return report


def draw(report: dict[str, Any], out: Path) -> Path:
    """Draw a report's page into the folder ``out``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report is damaged.
    """
    from ..requirements import require_matplotlib

    require_matplotlib()
    from .page import render

    path = out / PAGE_NAME
    with reading(out / JSON_NAME):
        page = render(report)
    write_whole(path, page)
    return path
