"""Named collections of lm-eval tasks, and what of them is run at a time."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot",
)  # fmt: skip
# Those made without downloads.
MADE_HERE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
# Of the user's own text, defined in tasks/.
OWN_TEXT = ("foxlm_bits", "foxlm_next_lines")
LONGBENCH = (
    "longbench_narrativeqa", "longbench_qasper", "longbench_multifieldqa_en", "longbench_multifieldqa_zh",
    "longbench_hotpotqa", "longbench_2wikimqa", "longbench_musique", "longbench_dureader", "longbench_gov_report",
    "longbench_qmsum", "longbench_multi_news", "longbench_vcsum", "longbench_trec", "longbench_triviaqa",
    "longbench_samsum", "longbench_lsht", "longbench_passage_count", "longbench_passage_retrieval_en",
    "longbench_passage_retrieval_zh", "longbench_lcc", "longbench_repobench-p",
)  # fmt: skip
# Language modeling and short questions, as in the papers of FoX (arXiv 2503.02130) and ACP (arXiv 2504.06949).
PAPER = (
    "wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "copa", "openbookqa",
    "sciq", "boolq",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """Tasks under one name.

    Attributes:
        tasks: as lm-eval names them.
        lengths: tokens of the prompts of RULER's tasks, which are made to any length.
        shots: examples in each prompt; None is as each task has it.
        limit: questions of each task, unless another number is asked for; None is all.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (4096,)
    shots: int | None = None
    limit: int | None = None


SUITES = {
    "paper": Suite(PAPER, shots=0),
    "long": Suite(RULER + LONGBENCH, lengths=(4096, 8192, 16384)),
    # Made in code: nothing is downloaded. Prompts of 1,024 tokens have room for these even if tokens are bytes.
    "quick": Suite(("niah_single_1", "niah_multikey_2", "ruler_fwe"), lengths=(1024,), limit=10),
}


@dataclass(frozen=True)
class Unit:
    """What is run, recorded and repeated as a whole: a task, or a group of lm-eval's.

    Attributes:
        task: its name.
        length: tokens of the prompts of a RULER task, or None.
    """

    task: str
    length: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.task if self.length is None else f"{self.task} at {self.length}"

    @property
    def file(self) -> str:
        """Of its results. `foxlm card` looks for files of such names."""
        return f"results_{self._stem}.json"

    @property
    def samples_file(self) -> str:
        """Of the questions and answers."""
        return f"samples_{self._stem}.jsonl"

    @property
    def _stem(self) -> str:
        stem = re.sub(r"[^\w.-]", "-", self.task)
        return stem if self.length is None else f"{stem}_{self.length}"


def units_of(tasks: Sequence[str], lengths: Sequence[int]) -> list[Unit]:
    """One unit for each task, of RULER's one for each length: a failure, a limit and a rerun then concern only that."""
    units = [Unit(task, length) for task in tasks for length in (lengths if task in RULER else (None,))]
    return list(dict.fromkeys(units))


def parse_lengths(text: str) -> tuple[int, ...]:
    """``4096,8192`` as numbers, ascending.

    Raises:
        ValueError: ``text`` is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 64 for part in parts):
        raise ValueError(f"lengths must be whole numbers of at least 64 with commas between them, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise `ValueError` for a task that lm-eval does not know, with what it might have been."""
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `foxlm lm-eval ls tasks` lists all"
            raise ValueError(f"tasks: lm-eval knows no {task!r}{hint}")
