"""Load a model to be evaluated, of any kind that transformers knows, and set how a FoX prunes."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from foxlm.kernels.argument_types import typed
from foxlm.kernels.backends import PYTORCH, backend_of
from foxlm.kernels.pruning.rules import Rule
from foxlm.modeling.attention_settings import attention_settings, pruned_at_any_length
from foxlm.modeling.configuration_fox import DEFAULT_IMPLEMENTATION, FoxConfig
from foxlm.modeling.model_files import read_config, read_model, reason

# One of them is what any tokenizer of transformers saves.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*", "special_tokens_map.json")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@typed
def load_model(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", eps: float | str = "model", rule: str = "model"
) -> PreTrainedModel:
    """A causal language model, ready for inference.

    Args:
        source: folder, or name on the Hugging Face Hub.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``, with an index if wanted.
        dtype: ``auto`` (as the weights were saved), or one of `DTYPES`.
        eps: attention weight that pruning may leave out of each row; ``0`` prunes nothing, ``model`` is as the model's
            own configuration says.
        rule: ``paper``, ``tight`` or ``measured``, how that is proven; ``model`` as above.

    Raises:
        ValueError: an argument is none of these, or ``eps`` or ``rule`` is given for a model without forget gates.
        OSError: ``source`` cannot be read.
    """
    source, device = str(source), resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    config = read_config(source)
    changes = pruning_changes(eps, rule)
    if changes and (not isinstance(config, FoxConfig) or config.forget_gate == "none"):
        raise ValueError(f"eps and rule are of FoX models with forget gates, {source} ({config.model_type}) has none")
    for name, value in changes.items():
        setattr(config, name, value)
    if isinstance(config, FoxConfig):
        config.validate()
    model, found = read_model(source, config=config, dtype=DTYPES.get(dtype, dtype))
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} weights of its model, such as {missing[0]}")
    return model.to(device).eval()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; a ValueError where there is none."""
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ValueError(
            f"{source} has no tokenizer: save one beside the model (tokenizer.save_pretrained({str(source)!r}))"
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises exceptions of no type of their own
        raise ValueError(f"{source} has no tokenizer that can be loaded: {reason(error)}") from error


def resolve_device(device: str) -> str:
    """``device`` with ``auto`` replaced; a ValueError where it is unknown, or torch sees no such GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu" and int(device[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device}, but torch sees {torch.cuda.device_count()} CUDA GPUs")
    return device


def pruning_changes(eps: float | str, rule: str) -> dict[str, Any]:
    """Fields of `FoxConfig` that ``eps`` and ``rule`` of `load_model` change."""
    changes: dict[str, Any] = {}
    if eps != "model":
        try:
            value = float(eps)
        except ValueError:
            value = math.nan
        if not 0 <= value < 1:
            raise ValueError(f"eps must be 0 (nothing is pruned), a number below 1, or model, got {eps!r}")
        changes["acp_eps"] = value or None
    if rule != "model":
        if rule not in get_args(Rule):
            raise ValueError(f"rule must be {', '.join(get_args(Rule))} or model, got {rule!r}")
        changes["acp_rule"] = rule
    return changes


@contextmanager
def pruning_as_asked(eps: float | str, rule: str) -> Iterator[None]:
    """While it is open, prompts are pruned however short they are, if ``eps`` or ``rule`` is given.

    By itself a model leaves short prompts whole, for which a search takes longer than it saves: what pruning changes
    would then not show.

    Args:
        eps, rule: as for `load_model`.

    Raises:
        ValueError: ``rule`` is ``measured``, by which nothing is pruned without gradients.
    """
    if rule == "measured":
        raise ValueError(f"rule must be paper, tight or model, got {rule!r}, which is for training: others go by tight")
    with pruned_at_any_length() if pruning_changes(eps, rule) else nullcontext():
        yield


@torch.no_grad()
def pruning_used(model: PreTrainedModel) -> dict[str, Any]:
    """For the record: ``eps`` and ``rule`` by which it prunes without gradients, and what prunes by them here.

    ``attention`` leaves nothing out where it runs in PyTorch, or below ``least_pairs`` pairs of query and key of all
    heads; ``generation`` may free cached keys there all the same. What does not apply is None.
    """
    config = model.config
    if getattr(config, "acp_eps", None) is None or config.forget_gate == "none":
        return {"eps": None, "rule": None, "attention": False, "least_pairs": None, "generation": False}
    q = torch.empty(1, 1, config.num_attention_heads, config.head_dim, dtype=model.dtype, device=model.device)
    attention = config._attn_implementation == DEFAULT_IMPLEMENTATION and backend_of(q) is not PYTORCH
    generation = attention or config.free_dead_cache
    settings = attention_settings(config, learns=False)
    return {
        "eps": settings.eps,
        "rule": settings.rule,
        "attention": attention,
        "least_pairs": settings.least_pairs if attention else None,
        "generation": generation,
    }


def model_name(source: str) -> str:
    """What to call a model in tables: the name of its folder, with the one above where that says too little."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    *_, above, last = ("", *folder.resolve().parts)
    return f"{above}/{last}" if last == "model" or last.startswith("checkpoint-") else last


def trained_length(source: str) -> int | None:
    """``max_position_embeddings`` of a model's configuration, if it has one."""
    return getattr(read_config(source), "max_position_embeddings", None)


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens a model that learned an embedding of each position can take in; None for all others."""
    for name, module in model.named_modules():
        learned = name.rsplit(".", 1)[-1] in ("wpe", "embed_positions", "position_embeddings")
        if learned and isinstance(module, torch.nn.Embedding):
            # Some tables begin with rows that stand for no position.
            longest = getattr(model.config, "max_position_embeddings", None)
            return min(module.num_embeddings, longest or module.num_embeddings)
    return None
