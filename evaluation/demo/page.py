"""The demo's page: one HTML file that needs nothing else, readable on a phone."""

from html import escape
from typing import Any

from ..page import facts, image, page
from ..plots.figure import data_uri
from ..plots.gates import plot_attention_maps, plot_decay_times, plot_skipped
from ..plots.training import plot_losses
from .analyze import LOG_EPS, MAP_LOG_EPS, MAP_RULE, TILE, Analysis
from .train import Training


def render(report: dict[str, Any], training: Training, analysis: Analysis) -> str:
    """The page as HTML text.

    Args:
        report: what `report.json` holds.
        training: loss curves.
        analysis: gates and pruning.
    """
    losses, run = report["held_out_bits_per_byte"], report["run"]
    figures = {
        "loss": plot_losses(training.train_losses, training.held_out_losses, losses["bigram"]),
        "decay": plot_decay_times(analysis.decay_times, analysis.tokens, "held-out bytes"),
        "skipped": plot_skipped(LOG_EPS, analysis.pairs, analysis.length),
        "maps": plot_attention_maps(
            [
                (
                    f"layer {head.layer}, head {head.head}: decay time {head.decay_time:,.1f} tokens",
                    head.weights,
                    head.first,
                )
                for head in analysis.maps
            ],
            MAP_RULE,
            MAP_LOG_EPS,
        ),
    }
    images = {name: data_uri(figure) for name, figure in figures.items()}
    tile = f"{TILE[0]}x{TILE[1]}"
    sections = [
        f"<h1>foxlm demo: a {report['model']['parameters'] / 1e6:.1f}M-parameter Forgetting Transformer</h1>",
        f"<p>{_summary(report)}</p>",
        facts(_headline(report)),
        "<h2>Loss</h2>",
        image(images["loss"], "Loss by step"),
        f"<p class=small>Trained on {report['corpus']['train_files']} files "
        f"({report['corpus']['train_bytes'] / 1e6:.1f} MB) of Python's standard library; measured on "
        f"{report['corpus']['held_out_files']} other files ({report['corpus']['held_out_bytes'] / 1e6:.2f} MB). "
        "The curve uses a few held-out windows, the table above "
        f"{losses['bytes']:,} bytes in windows of {losses['window']} bytes.</p>",
        "<h2>Forget gates</h2>",
        image(images["decay"], "Decay time of each layer and head"),
        "<p class=small>A head with a short decay time looks at the last few bytes; one with a long decay time sees "
        "the whole window.</p>",
        "<h2>What pruning skips</h2>",
        image(images["skipped"], "Share of attention skipped by eps"),
        "<p class=small>Adaptive Computation Pruning leaves out keys that together hold less than eps of a row's "
        f"attention weight, whatever their values. In tiles of {tile}, as a kernel skips them, at "
        f"eps = e<sup>{MAP_LOG_EPS:g}</sup>: {_tiles(report, analysis)}.</p>",
        image(images["maps"], "Attention maps of two heads with the skipped region"),
        "<h2>Text it writes</h2>",
        "<p class=small>Sampled after loading the folder with <code>AutoModelForCausalLM.from_pretrained</code> in a "
        "new process. The prompt is in blue.</p>",
        *(
            f"<pre><b>{escape(item['prompt'])}</b>{escape(item['text'])}</pre>"
            for item in report["reload"]["generated"]
        ),
        "<h2>The run</h2>",
        facts([(key, escape(str(value))) for key, value in run.items()]),
    ]
    return page("foxlm demo", sections)


def _summary(report: dict[str, Any]) -> str:
    losses, training = report["held_out_bits_per_byte"], report["training"]
    return (
        f"Trained from nothing for {training['seconds']:.0f} seconds on {escape(report['run']['device'])}, "
        f"on {training['tokens'] / 1e6:.2f} million bytes. On files it has not seen it needs "
        f"<b>{losses['fox']:.2f} bits per byte</b>; a bigram model counted on all training files needs "
        f"{losses['bigram']:.2f}."
    )


def _headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    losses, training, lm_eval = (report[key] for key in ("held_out_bits_per_byte", "training", "lm_eval"))
    reload = report["reload"]
    lines = lm_eval["next_lines"]
    stopped = " (stopped early: out of time)" if training["stopped_early"] else ""
    return [
        ("FoX (Pro), held-out bits per byte", f"{losses['fox']:.3f}"),
        ("byte bigrams, held-out bits per byte", f"{losses['bigram']:.3f}"),
        (
            "FoX on a sample, before saving and after reloading",
            f"{reload['bits_per_byte_before_saving']:.4f}, {reload['bits_per_byte']:.4f}",
        ),
        (
            f"lm-eval: which of {lines['choices']} continuations fits best ({lines['samples']} questions)",
            f"{100 * lines['acc_mutual_info']:.1f} ± {100 * lines['acc_mutual_info_stderr']:.1f}% "
            f"(chance {100 / lines['choices']:.0f}%; by raw likelihood {100 * lines['acc']:.1f}%)",
        ),
        ("lm-eval: bits per byte, rolling windows", f"{lm_eval['bits']['bits_per_byte']:.3f}"),
        ("training", f"{training['seconds']:.0f} s, {training['steps']} steps{stopped}"),
        ("training speed", f"{training['tokens'] / training['seconds']:,.0f} bytes/s"),
        ("whole demo", f"{report['seconds']:.0f} s"),
    ]


def _tiles(report: dict[str, Any], analysis: Analysis) -> str:
    index = report["pruning"]["log_eps"].index(MAP_LOG_EPS)
    shares = report["pruning"]["skipped_tiles"]
    return ", ".join(f"{100 * shares[rule][index]:.0f}% by rule {rule}" for rule in shares)
