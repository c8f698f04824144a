"""Write the model card, ``README.md``, of a folder from its configuration, weights and evaluation results."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from foxlm.conversion.checkpoint_io import StoredWeights
from foxlm.conversion.fox_folder import TASKS, architecture_of, read_config
from foxlm.conversion.hub.evaluation_results import Pruning, Results, read_results
from foxlm.conversion.links import check_links
from foxlm.kernels.argument_types import typed
from foxlm.modeling.attention_settings import attention_settings
from foxlm.modeling.configuration_fox import FoxConfig

# Marks what only the author can write; `foxlm publish` refuses a card that still contains it.
MISSING = "[to be filled in]"
_GATES = {
    "full": "`f_t = sigmoid(w·x_t + b)`, from the token",
    "bias_only": "`f = sigmoid(b)`, learned, the same for all tokens",
    "fixed": "`f = sigmoid(b)`, constant",
    "none": "none: nothing is forgotten",
}
_QK_NORMS = {
    "per_head": "QK-norm",
    "shared": "QK-norm shared by heads",
    "all_heads": "QK-norm over all heads",
    "none": "no QK-norm",
}
_CITATIONS = """```bibtex
@inproceedings{lin2025forgetting,
  title = {Forgetting Transformer: Softmax Attention with a Forget Gate},
  author = {Lin, Zhixuan and Nikishin, Evgenii and He, Xu Owen and Courville, Aaron},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://arxiv.org/abs/2503.02130}
}
@article{lin2025adaptive,
  title = {Adaptive Computation Pruning for the Forgetting Transformer},
  author = {Lin, Zhixuan and Obando-Ceron, Johan and He, Xu Owen and Courville, Aaron},
  journal = {arXiv preprint arXiv:2504.06949},
  year = {2025},
  url = {https://arxiv.org/abs/2504.06949}
}
```"""


@typed
def write_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    training_data: str | None = None,
    evaluations: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write ``README.md`` into a folder that `save_pretrained` made.

    Args:
        folder: with ``config.json`` and weights.
        name: of the model; the folder's by default.
        license: of the weights, as the Hub writes it (``"apache-2.0"``).
        languages: codes (``"en"``), or ``"code"``.
        base_model: on the Hub, of a model made from another one.
        datasets: on the Hub, that the model was trained on.
        training_data: what it was trained on, in words.
        evaluations: files and folders as `read_results` takes them.
        overwrite: replace a card that is there.

    Returns:
        The card's path. What was not given and should be said is marked `MISSING`.

    Raises:
        ValueError: the folder holds no FoX model, or a card and ``overwrite`` is not set; ``license`` is not as above;
            or as `read_results`.
    """
    folder = Path(folder)
    card = folder / "README.md"
    if license is not None:
        check_license(license)
    config = read_config(folder)
    check_links(folder)
    stored = StoredWeights(folder)
    if card.exists() and not overwrite:
        raise ValueError(f"{card} is there already; --overwrite replaces it, with what was written by hand")
    architecture = architecture_of(config)
    results = read_results(evaluations)
    name = name or folder.resolve().name
    auto_class, task = TASKS[architecture]
    data = ModelCardData(
        language=list(languages) or None,
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["fox", "forgetting-transformer", "foxlm", "custom_code"],
        base_model=base_model,
        datasets=list(datasets) or None,
        model_name=name,
        eval_results=_eval_results(results, task) or None,
    )
    sections = {
        name: _introduction(config, license, base_model),
        "How to load": _loading(auto_class),
        "Architecture": _architecture(config, sum(weight.numel() for weight in stored.headers.values())),
        "Training": training_data or f"{MISSING} what the model was trained on, and how (`--training-data`).",
        "Evaluation": _evaluation(results),
        "Pruning": _pruning(config, results.pruning),
        "Limits": _limits(config),
        "Citation": _CITATIONS,
    }
    text = "\n\n".join(f"{'#' if title is name else '##'} {title}\n\n{body}" for title, body in sections.items())
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(card)
    return card


def _eval_results(results: Results, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=score.task,
            dataset_name=score.task,
            dataset_args=None if score.shots is None else {"num_few_shot": score.shots},
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in results.scores.values()
    ]


def check_license(license: str) -> None:
    """Raise a `ValueError` unless ``license`` is written as the Hub writes them."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"license must be written as on the Hub, apache-2.0 for example, or other, got {license!r}")


def _introduction(config: FoxConfig, license: str | None, base_model: str | None) -> str:
    gated = config.forget_gate != "none"
    paper = "Forgetting Transformer (FoX, [arXiv 2503.02130](https://arxiv.org/abs/2503.02130))"
    lines = [
        f"A {paper}: softmax attention in which each head has a forget gate. Made with foxlm."
        if gated
        else f"A Transformer, in the code of the {paper} but without its forget gates. Made with foxlm."
    ]
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a pretrained model"
    if config.grafted_from:
        base += f" (`{config.grafted_from}`)"
        lines.append(
            f"Forget gates were grafted onto {base}." if gated else f"It has the weights of {base} to start from."
        )
    elif base_model:
        lines.append(f"It was made from {base}.")
    if license is None:
        lines.append(f"License of the weights: {MISSING} (`--license`, or `license:` in this file's first lines).")
    return "\n\n".join(lines)


def _loading(auto_class: str) -> str:
    return f"""It needs torch 2.11 and transformers 5.17, or newer, and for its GPU kernels Triton. Where foxlm is
imported, that is used; elsewhere the model's own code in this folder, with the same results:

```python
from transformers import {auto_class}, AutoTokenizer

folder = "path/to/this/folder"  # or its name on the Hub
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
```

The tokenizer has no code of its own; without `trust_remote_code=False` transformers asks all the same."""


def _architecture(config: FoxConfig, parameters: int) -> str:
    heads, kv_heads, head_dim = config.heads
    parts = {
        _QK_NORMS[config.qk_norm]: config.qk_norm != "none",
        "key shift": config.use_key_shift,
        "value shift": config.use_value_shift,
        "output gate": config.use_output_gate,
        "output norm": config.use_output_norm,
    }
    is_pro = all(parts.values())
    parts["norms after attention and MLP"] = config.norm_position == "post"
    on = ", ".join(part for part, used in parts.items() if used)
    gates = _GATES[config.forget_gate]
    positions = "none: the gates carry position"
    if config.forget_gate == "none":
        positions = "none"
    else:
        gates += f"; one for each {config.forget_gate_heads.replace('_', '/')} head"
    if config.rope_parameters is not None:
        positions = f"RoPE ({config.rope_parameters.get('rope_type', 'default')})"
    if config.nope_layers:
        positions += f", but none in layers {', '.join(map(str, config.nope_layers))}, counted from 0"
    rows = {
        "parameters": f"{parameters:,}",
        "block": f"Pro ({on})" if is_pro else f"LLaMA with {on}" if on else "LLaMA",
        "forget gates": gates,
        "position embeddings": positions,
        "layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
        "heads": f"{heads} of {head_dim}" + ("" if heads == kv_heads else f", {kv_heads} for keys and values"),
        "MLP": f"{config.intermediate_size}, gated {config.hidden_act}",
        "vocabulary": f"{config.vocab_size:,}" + (", embeddings tied" if config.tie_word_embeddings else ""),
        "meant for up to": f"{config.max_position_embeddings:,} tokens",
    }
    return _table(["", ""], list(rows.items()))


def _evaluation(results: Results) -> str:
    if not results.scores:
        return "No results were at hand when this card was written."
    rows = [
        [
            score.task,
            "" if score.shots is None else str(score.shots),
            "" if score.samples is None else str(score.samples),
            score.metric,
            f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}"),
        ]
        for score in results.scores.values()
    ]
    by = f"By {' and '.join(results.sources)}.\n\n" if results.sources else ""
    return by + _table(["task", "shots", "samples", "metric", "value"], rows)


def _pruning(config: FoxConfig, measured: Pruning | None) -> str:
    if config.forget_gate == "none":
        return "Without forget gates nothing can be pruned."
    lines = [
        "Adaptive Computation Pruning ([arXiv 2504.06949](https://arxiv.org/abs/2504.06949)) leaves out keys of which "
        "it is proven that no query loses more than eps of its attention weight. "
        + (
            "This model is set to leave out nothing (`acp_eps` is null)."
            if config.acp_eps is None
            else f"This model does so on GPU kernels, with eps = {config.acp_eps:.2g} and rule {_rules(config)}."
        )
    ]
    if measured is None:
        return lines[0] + " How much that is was not measured when this card was written."
    rows = [
        [f"e^{log_eps:g}", f"`{rule}`", f"{pairs:.0%}", f"{tiles:.0%}"]
        for (log_eps, rule), (pairs, tiles) in measured.shares.items()
    ]
    block_q, block_k = measured.tile
    lines.append(f"Measured on {measured.tokens:,} held-out tokens in windows of {measured.length:,}:")
    lines.append(_table(["eps", "rule", "pairs left out", f"tiles of {block_q} x {block_k} left out"], rows))
    return "\n\n".join(lines)


def _rules(config: FoxConfig) -> str:
    used = attention_settings(config, learns=False).rule
    return f"`{used}`" if used == config.acp_rule else f"`{config.acp_rule}` in training, `{used}` elsewhere"


def _limits(config: FoxConfig) -> str:
    lines = [
        "The GPU kernels run on NVIDIA GPUs of compute capability 8.0 or more; elsewhere attention is plain PyTorch "
        "and leaves out nothing.",
        "4-D attention masks, quantized caches, FlashAttention and continuous batching are refused.",
        f"It was made for sequences of up to {config.max_position_embeddings:,} tokens.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
