"""Models, questions and data sets for tests of evaluation by lm-eval: all tiny, none downloaded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from models import tiny_model

BYTES: dict[str, Any] = {
    "vocab_size": 258,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "max_position_embeddings": 512,
}
# Of very different lengths, so that batches are padded.
PROMPTS = ["def f(x):\n", "import os\n" * 15, "a", "class A:\n    x = 1\n" * 4, "while True:"]
CONTINUATIONS = ["    return x", "import sys\n", "b", "    y = 2\n", " pass"]


def save_fox(folder: Path, **overrides: Any) -> Path:
    """A random byte-level FoX with its tokenizer, float64."""
    model = tiny_model("pro", **(BYTES | overrides))
    with torch.no_grad():
        # At its usual zero, a padding token that is not masked changes nothing behind an output norm.
        model.get_input_embeddings().weight[BYTES["pad_token_id"]].normal_()
    model.generation_config.pad_token_id = BYTES["pad_token_id"]
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A random byte-level Llama with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **BYTES, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def likelihoods(lm: Any) -> list[float]:
    """Of `CONTINUATIONS` after `PROMPTS`, and of the prompts themselves by rolling windows."""
    from lm_eval.api.instance import Instance

    pairs = zip(PROMPTS, CONTINUATIONS, strict=True)
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    whole = [Instance("loglikelihood_rolling", {}, (prompt,), index) for index, prompt in enumerate(PROMPTS)]
    found = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    return found + lm.loglikelihood_rolling(whole, disable_tqdm=True)


def generated(lm: Any, tokens: int = 8, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """What follows ``prompts``."""
    from lm_eval.api.instance import Instance

    how = {"until": [], "max_gen_toks": tokens, "do_sample": False, "temperature": 0.0}
    asked = [Instance("generate_until", {}, (prompt, how), index) for index, prompt in enumerate(prompts)]
    return lm.generate_until(asked, disable_tqdm=True)


_CHOICES = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
_ARC = {"id": "1", "question": "Which is first?", "choices": _CHOICES, "answerKey": "A"}
# What the data sets of the papers' tasks look like: repository, configuration and a row.
STOCK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", {"page": " = A = \n a page . \n"}),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", {"text": "the dog saw the dog"}),
    "piqa": ("baber/piqa", "default", {"goal": "open it", "sol1": "pull", "sol2": "wait", "label": 0}),
    "hellaswag": (
        "Rowan/hellaswag",
        "default",
        {"ctx_a": "He", "ctx_b": "runs", "activity_label": "Sport", "endings": ["a", "b", "c", "d"], "label": "2"},
    ),
    "winogrande": (
        "allenai/winogrande",
        "winogrande_xl",
        {"sentence": "Ann told Bo that _ won.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    ),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", _ARC),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", _ARC),
    "copa": (
        "aps/super_glue",
        "copa",
        {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "idx": 0, "label": 0},
    ),
    "openbookqa": (
        "allenai/openbookqa",
        "main",
        {"id": "1", "question_stem": "The sun is", "choices": _CHOICES, "answerKey": "B"},
    ),
    "sciq": (
        "allenai/sciq",
        "default",
        {
            "question": "What is it?",
            "distractor1": "air",
            "distractor2": "ice",
            "distractor3": "oil",
            "correct_answer": "water",
            "support": "It is wet.",
        },
    ),
    "boolq": (
        "aps/super_glue",
        "boolq",
        {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
    ),
}


def write_data_sets(folder: Path, tasks: list[str], copies: int = 3) -> None:
    """Folders ``owner/name`` as data sets on the Hub are laid out, which `datasets` takes from the current folder."""
    for repository in {STOCK[task][0] for task in tasks}:
        (folder / repository).mkdir(parents=True)
        configs = []
        for name, row in [STOCK[task][1:] for task in tasks if STOCK[task][0] == repository]:
            file = folder / repository / f"{name}.jsonl"
            file.write_text((json.dumps(row) + "\n") * copies)
            splits = ("train", "validation", "test")
            configs.append({"config_name": name, "data_files": [{"split": one, "path": file.name} for one in splits]})
        # JSON is YAML too.
        front = json.dumps({"configs": configs})[1:-1]
        (folder / repository / "README.md").write_text(f"---\n{front}\n---\n")
