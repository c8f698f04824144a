"""Graft a model in a folder with decay times and sinks calibrated on a text, and report what that costs and saves."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from foxlm.conversion.calibration import SHORTEST, Calibration, calibrate
from foxlm.conversion.graft import graft
from foxlm.conversion.recall import check_recall, recalled, with_recall
from foxlm.evaluation.loading import load_tokenizer, resolve_device
from foxlm.evaluation.loss_by_position import bootstrap_means, row_losses
from foxlm.evaluation.provenance import provenance
from foxlm.evaluation.results import write_json, write_whole
from foxlm.evaluation.tables import percent, table
from foxlm.evaluation.text import check_tokens, files, rows
from foxlm.kernels.tiles import PRUNED_QUERIES
from foxlm.modeling.configuration_fox import DEFAULT_LOG_EPS
from foxlm.modeling.modeling_fox import FoxForCausalLM

# Texts that are longer than this are cut to rows of it, unless the user says otherwise.
_DEFAULT_LENGTH = 8192
# Rows from which an interval over rows is given.
_LEAST_ROWS = 4


@dataclass(frozen=True)
class CalibrationText:
    """What `calibrated_graft` calibrates on.

    Attributes:
        path: as `evaluation.text.documents` takes it.
        skip, longest: share of attention to skip, and longest decay time in tokens, as for `calibrate`.
        recall: share of a row, as for `with_recall`, that asks for what it holds: decay times are chosen by such rows.
        separator: token that texts begin with, by its name in the tokenizer; None takes the beginning-of-text token,
            or else the end-of-text token.
        length: tokens of a row, the separator included; None takes what the base was trained at, at most 8,192.
        rows: how many of them.
        join: as for `evaluation.text.rows`.
        device: as for `evaluation.loading.load_model`.
        seed: as for `calibrate`.
        held_out: other texts, each as ``path``, on which the graft's loss is compared with the base's: ``rows`` rows
            of each, after the separator like those that are calibrated on.
    """

    path: Path
    skip: float = 0.5
    longest: float = math.inf
    recall: float = 0.25
    separator: str | None = None
    length: int | None = None
    rows: int = 4
    join: bool = False
    device: str = "auto"
    seed: int = 0
    held_out: tuple[Path, ...] = ()


def calibrated_graft(source: Path, text: CalibrationText, **options: Any) -> tuple[FoxForCausalLM, dict[str, Any]]:
    """`graft` of the model in ``source``, calibrated on ``text``, with bars on stderr; and a report as JSON holds it.

    Args:
        source: folder of the model and its tokenizer.
        text: to calibrate on.
        options: of `graft`.

    Raises:
        ValueError: a text has no row of that length, a held-out text is calibrated on, a number is out of range, or as
            `graft`.
        OSError: a file cannot be read.
    """
    _check(text)
    for name in ("decay_times", "calibration"):
        if options.pop(name, None) is not None:
            raise ValueError(f"{name} has no effect where a calibration sets decay times")
    if options.get("forget_gate") == "none":
        raise ValueError("calibration has no effect with forget_gate 'none'")
    began, device = time.monotonic(), resolve_device(text.device)
    run = provenance(device, text.seed)
    tokenizer = load_tokenizer(str(source))
    separator = separator_of(tokenizer, text.separator)
    rope_factor = options.get("rope_factor")
    base = _measurable(graft(source, forget_gate="none", rope_factor=rope_factor), device)
    length = text.length or min(round(base.config.max_position_embeddings / (rope_factor or 1)), _DEFAULT_LENGTH)

    def read(path: Path) -> Tensor:
        found = rows(path, tokenizer, length - 1, text.rows, text.join)
        return torch.from_numpy(np.stack([np.concatenate([[separator], row]) for row in found]))

    tokens = read(text.path)
    recalling, again = with_recall(tokens, text.recall, text.seed), recalled(length, text.recall)
    held_out = [_held_out(path, read, text.path, tokens, base.config.vocab_size) for path in text.held_out]
    # With how many tokens at their end count.
    texts = [(x, length - 1) for x in (tokens, *held_out)] + ([(recalling, again)] if again else [])
    calibration = calibrate(
        base,
        recalling,
        skip=text.skip,
        longest=text.longest,
        forget_gate_heads=options.get("forget_gate_heads", "query"),
        seed=text.seed,
        progress=True,
    )
    base_losses = [_losses(base, x, "loss of the base")[:, -last:] for x, last in texts]
    del base
    model = graft(source, calibration=calibration, **options)
    measurable = _measurable(model, device)
    graft_losses = [_losses(measurable, x, "loss of the graft")[:, -last:] for x, last in texts]
    loss, *others = (_compared(*pair) for pair in zip(base_losses, graft_losses, strict=True))
    recall = {"share": text.recall, "tokens": again} | (others.pop() if again else {})
    settings = {
        "text": text.path.name,
        "rows": len(tokens),
        "separator": tokenizer.convert_ids_to_tokens(separator),
        "joined": text.join,
        "options": options,
    }
    found = [{"text": path.name, **other} for path, other in zip(text.held_out, others, strict=True)]
    report = _report(calibration, loss, recall, found) | {"settings": settings}
    return model, {"run": run | {"seconds": time.monotonic() - began}} | report


def _check(text: CalibrationText) -> None:
    """Refuse numbers that are out of range, by the names of the command's options."""
    if not 0.0 < text.skip < 1.0:
        raise ValueError(f"skip must be a share between 0 and 1, got {text.skip}")
    if not text.longest >= SHORTEST:
        raise ValueError(f"longest must be a decay time of at least {SHORTEST:g} tokens, got {text.longest}")
    check_recall(text.recall)
    if text.rows < 1:
        raise ValueError(f"rows must be at least 1, got {text.rows}")
    if text.length is not None and text.length <= 2 * PRUNED_QUERIES:
        raise ValueError(f"length must be more than {2 * PRUNED_QUERIES} tokens, got {text.length}")


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``calibration.json``, ``calibration.md`` and, where matplotlib is installed, ``calibration.svg``."""
    write_json(folder / "calibration.json", report)
    write_whole(folder / "calibration.md", as_markdown(report))
    if find_spec("matplotlib") is not None:
        from foxlm.evaluation.plots.figure import save_plot
        from foxlm.evaluation.plots.pruning import plot_head_map

        times = np.array(report["by_head"]["decay_times"], dtype=float)
        # None, for ever, is NaN by now.
        figure = plot_head_map(np.where(np.isnan(times), np.inf, times), _title(report), "gate", unit="tokens")
        save_plot(figure, folder / "calibration.svg")


def as_markdown(report: dict[str, Any]) -> str:
    """The report for a reader: totals, what other shares would cost, and decay times by layer and head."""
    loss, by_head, count = report["loss"], report["by_head"], report["settings"]["rows"]
    lines = [f"# {_title(report)}", ""]
    lines += [
        f"No training; {count} row{'s' * (count != 1)} of {report['length']:,} tokens of {report['settings']['text']}, "
        f"each after {report['settings']['separator']}.",
        "",
        f"- Loss: base {loss['base']:.4f}, graft {loss['graft']:.4f} nats a token, {100 * loss['over']:+.2f}%.",
        f"- Attention skipped at eps = e^{DEFAULT_LOG_EPS:g}, tiles: "
        + ", ".join(f"{percent(share)} by the rule {rule}" for rule, share in report["skipped"].items())
        + ".",
        "",
        *_recall_lines(report["recall"]),
        *_held_out_lines(report["held_out"]),
        "What other shares are expected to cost, in nats a token (second order, heads independent):",
        "",
        table(
            ["--skip", *(f"{float(x):g}" for x in report["frontier"])],
            [["nats", *(f"{x:.4f}" for x in report["frontier"].values())]],
        ),
        "",
        "Decay times in tokens by layer and gate; in parentheses the distance within which 90% of attention lies:",
        "",
    ]
    group = len(by_head["reach"][0]) // len(by_head["decay_times"][0])
    cells = [
        [
            str(layer),
            *(
                f"{'inf' if time is None else f'{time:.0f}'} ({max(reach[gate * group : (gate + 1) * group]):.0f})"
                for gate, time in enumerate(times)
            ),
        ]
        for layer, (times, reach) in enumerate(zip(by_head["decay_times"], by_head["reach"], strict=True))
    ]
    lines.append(table(["layer", *map(str, range(len(by_head["decay_times"][0])))], cells))
    return "\n".join(lines) + "\n"


def _recall_lines(recall: dict[str, Any]) -> list[str]:
    if not recall["tokens"]:
        return []
    return [
        f"Decay times are chosen by these rows with their last {recall['tokens']:,} tokens replaced by passages of "
        f"them again, whose loss is: base {recall['base']:.4f}, graft {recall['graft']:.4f}.",
        "",
    ]


def _held_out_lines(held_out: list[dict[str, Any]]) -> list[str]:
    if not held_out:
        return []
    cells = []
    for x in held_out:
        ends = [f"{100 * end:+.2f}" for end in x["over_interval"] or ()]
        over = f"{100 * x['over']:+.2f}%" + (f" ({' to '.join(ends)})" if ends else "")
        cells.append([x["text"], str(len(x["by_row"]["base"])), f"{x['base']:.4f}", f"{x['graft']:.4f}", over])
    return [
        "Loss on texts that were not calibrated on, in nats a token; in parentheses the 95% interval of a bootstrap "
        f"over rows, if there are at least {_LEAST_ROWS}:",
        "",
        table(["text", "rows", "base", "graft", "over"], cells),
        "",
    ]


def _title(report: dict[str, Any]) -> str:
    share = percent(report["skipped"]["measured"])
    return f"Decay times that skip {share} of attention at {100 * report['loss']['over']:+.2f}% of loss"


def _report(
    calibration: Calibration, loss: dict[str, Any], recall: dict[str, Any], held_out: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "length": calibration.length,
        "skip": calibration.skip,
        "longest": calibration.longest if calibration.longest < math.inf else None,
        "loss": loss,
        "recall": recall,
        "held_out": held_out,
        "skipped": {rule: share.mean().item() for rule, share in calibration.skipped.items()},
        "frontier": {str(share): cost for share, cost in calibration.frontier.items()},
        "by_head": {
            # None: for ever, which JSON has no number for.
            "decay_times": [[x if x < math.inf else None for x in row] for row in calibration.decay_times.tolist()],
            "reach": calibration.reach.tolist(),
            "cost": calibration.cost.tolist(),
            **{f"skipped, {rule}": share.tolist() for rule, share in calibration.skipped.items()},
        },
    }


def _compared(base: Tensor, grafted: Tensor) -> dict[str, Any]:
    """Means of losses ``[rows, T - 1]``, and by how much the graft's is over the base's, with its 95% interval."""
    base, grafted = (x.double().mean(1) for x in (base, grafted))
    over = (grafted.mean() / base.mean()).item() - 1.0
    # To first order this is what each row adds to the ratio of the means.
    by_row = over + (grafted - (1.0 + over) * base) / base.mean()
    return {
        "base": base.mean().item(),
        "graft": grafted.mean().item(),
        "over": over,
        "over_interval": bootstrap_means(by_row[:, None])[1:, 0].tolist() if len(base) >= _LEAST_ROWS else None,
        "by_row": {"base": base.tolist(), "graft": grafted.tolist()},
    }


def _held_out(
    path: Path, read: Callable[[Path], Tensor], calibrated_path: Path, calibrated: Tensor, vocabulary: int
) -> Tensor:
    """Rows of a held-out text; a `ValueError` that names it if there are none, or if it was calibrated on."""
    try:
        tokens = read(path)
    except ValueError as error:
        wanted = f"a text with rows of {calibrated.shape[1] - 1} tokens"
        raise ValueError(f"held_out must be {wanted}: {error}") from None
    check_tokens(int(tokens.min()), int(tokens.max()), vocabulary, f"held_out {path}")
    ours, theirs = ({file.resolve() for file in files(x)} for x in (path, calibrated_path))
    # A copy under another name has the same rows.
    if ours & theirs or {tuple(row) for row in tokens.tolist()} & {tuple(row) for row in calibrated.tolist()}:
        raise ValueError(
            f"held_out must be another text than that of the calibration, got {path}, which holds some of it"
        )
    return tokens


def separator_of(tokenizer: PreTrainedTokenizerBase, name: str | None) -> int:
    """The token ``name``, or else that of the beginning of a text, or of its end.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if found is None:
            raise ValueError("the tokenizer has no beginning-of-text and no end-of-text token: give a separator")
        return int(found)
    if name not in tokenizer.get_vocab():
        raise ValueError(f"separator must be a token of the tokenizer, such as {tokenizer.eos_token}, got {name!r}")
    return int(tokenizer.get_vocab()[name])


def _measurable(model: FoxForCausalLM, device: str) -> FoxForCausalLM:
    """``model`` on ``device``; on a CPU a copy in float32 unless it is, which is faster there than half precision."""
    if device == "cpu" and model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    return model.to(device).eval()


def _losses(model: FoxForCausalLM, tokens: Tensor, name: str) -> Tensor:
    return torch.stack(list(row_losses(model, tqdm(tokens, desc=name, unit="row"))))
