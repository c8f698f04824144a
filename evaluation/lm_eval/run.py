"""Evaluate a model on lm-eval's tasks, one at a time: what fails is named, what is done is kept."""

import os
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foxlm.kernels.argument_types import typed
from foxlm.modeling.model_files import read_config

from ..loading import load_model, load_tokenizer, position_limit, pruning_as_asked, pruning_used
from ..provenance import provenance
from ..requirements import require
from ..results import fingerprint
from ..text import texts
from . import ruler
from .logs import LOGGER, cut_prompts, in_a_line, logged_to
from .model import as_lm_eval, check_tokenizer, own_max_length
from .offline import go_offline_if_unreachable, short_timeouts
from .options import Options
from .results import (
    LOG,
    SUMMARY,
    Row,
    check_finite,
    check_same_settings,
    earlier_results,
    rows_of,
    write_json,
    write_samples,
)
from .suites import MADE_HERE, OWN_TEXT, RULER, Unit, check_names, units_of

# Definitions of foxlm's own tasks.
TASKS = Path(__file__).parent / "tasks"
# Draws for standard errors that have no formula; lm-eval's 100,000 take minutes.
_BOOTSTRAP = 1000


@dataclass
class Outcome:
    """What `evaluate` leaves, beside its files.

    Attributes:
        rows: the table.
        interrupted: Ctrl-C came before the end.
    """

    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    @property
    def failed(self) -> int:
        """Number of tasks that failed."""
        return sum(row.failed is not None for row in self.rows)


@typed
def evaluate(options: Options, say: Callable[[str], None]) -> Outcome:
    """Run all tasks that are not done yet. Results are in ``options.out``, a file for each task and `SUMMARY`.

    Args:
        options: see there.
        say: takes a line about what happens.

    Raises:
        ValueError: an option, or an earlier result of other settings.
        ImportError: lm-eval is not installed.
        OSError: the model cannot be read, or results not written.
    """
    options = options.checked()
    require("lm-eval")
    # Before lm-eval's index of tasks, which takes ten seconds.
    read_config(options.model)
    with pruning_as_asked(options.eps, options.rule):
        return _evaluate(options, say)


def _evaluate(options: Options, say: Callable[[str], None]) -> Outcome:
    earlier = earlier_results(options.out, overwrite=False)
    run = _Run(options, say)
    for unit in run.units:
        check_same_settings({} if options.overwrite else earlier, unit, run.settings(unit))
    if options.overwrite:
        earlier = earlier_results(options.out, overwrite=True)
    options.out.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    try:
        with logged_to(options.out / LOG):
            for number, unit in enumerate(run.units, 1):
                where = f"[{number}/{len(run.units)}] {unit.name}"
                if unit.file in earlier:
                    say(f"{where}: done earlier")
                    outcome.rows += rows_of(earlier[unit.file])
                else:
                    say(where)
                    outcome.rows += run.one(unit)
    except KeyboardInterrupt:
        outcome.interrupted = True
    write_json(
        options.out / SUMMARY,
        {
            "complete": not outcome.interrupted,
            "suite": options.suite,
            "failed": {row.task: row.failed for row in outcome.rows if row.failed},
            "results": [vars(row) for row in outcome.rows if not row.failed],
            "run": run.provenance,
        },
    )
    return outcome


class _Run:
    """What is the same for all tasks of a run: the model, lm-eval's index of tasks, settings."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        from lm_eval.tasks import TaskManager

        self.options, self.say = options, say
        # First: lm-eval's index of tasks and the model take longer.
        self.tokenizer = load_tokenizer(options.model)
        self.text = None if options.text is None else _checksum(options.text)
        self.units = units_of((*options.tasks, *(OWN_TEXT if self.text else ())), options.lengths or ())
        self.unreachable: dict[str, str] = {}
        # lm-eval hands this to what makes the data of RULER's tasks and of those of one's own text.
        self.metadata: dict[str, Any] = {"tokenizer": options.model, "text": str(options.text), "seed": options.seed}
        include = [str(TASKS), *([] if options.include_path is None else [str(options.include_path)])]
        self.manager = TaskManager(include_path=include, metadata=self.metadata)
        check_names(options.tasks, self.manager.all_tasks)
        on_this_machine = {*OWN_TEXT, *(MADE_HERE if ruler.own_data() is None else RULER)}
        if not {unit.task for unit in self.units} <= on_this_machine and (why := go_offline_if_unreachable()):
            say(f"note: {why}; only data sets on this machine are used")
        self.model = load_model(
            options.model, device=options.device, dtype=options.dtype, eps=options.eps, rule=options.rule
        )
        check_tokenizer(self.model, self.tokenizer)
        self.own_length = options.max_length or own_max_length(self.model, self.tokenizer)
        self.positions = position_limit(self.model)
        self.pruning = pruning_used(self.model)
        self.weights = fingerprint(options.model)
        self.provenance = provenance(str(self.model.device), options.seed, ("lm-eval", "datasets"))

    def max_length(self, unit: Unit) -> int:
        """Tokens of prompt and answer that a task may have: what RULER asks for is never cut."""
        wanted = self.own_length if self.options.max_length or unit.length is None else unit.length + ruler.GENERATED
        return max(self.own_length, wanted if self.positions is None else min(wanted, self.positions))

    def settings(self, unit: Unit) -> dict[str, Any]:
        """What numbers depend on."""
        return {
            "weights": self.weights,
            "eps": self.pruning["eps"],
            "rule": self.pruning["rule"],
            "least_pairs": self.pruning["least_pairs"],
            "attention": self.model.config._attn_implementation,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
            "lm_eval": version("lm_eval"),
            "max_length": self.max_length(unit),
            "limit": self.options.limit,
            "shots": self.options.shots,
            "text": self.text if unit.task in OWN_TEXT else None,
        }

    def one(self, unit: Unit) -> list[Row]:
        """Run a task and write its results; the row of one that fails has its reason."""
        start = time.perf_counter()
        try:
            with cut_prompts() as cut:
                results = self._results(unit)
            results["foxlm"] = {
                "task": unit.task,
                "length": unit.length,
                "suite": self.options.suite,
                "model": self.options.model,
                "settings": self.settings(unit),
                "pruning": self.pruning,
                "cut_prompts": cut.count > 0,
                "seconds": round(time.perf_counter() - start, 2),
                "run": self.provenance,
            }
            check_finite(results)
            samples = results.pop("samples")
            if self.options.samples:
                write_samples(self.options.out / unit.samples_file, chain.from_iterable(samples.values()))
            write_json(self.options.out / unit.file, results)
        # Also what a task's own code raises, and exits.
        except (Exception, SystemExit) as error:
            LOGGER.error("%s\n%s", unit.name, traceback.format_exc())
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            reason = in_a_line(error)
            self.say(f"  failed: {reason}")
            return [Row(unit.name, failed=reason)]
        if cut.count:
            self.say(f"  note: lm-eval cut prompts on the left to --max-length {self.max_length(unit)}")
        return rows_of(results)

    def _results(self, unit: Unit) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate as lm_evaluate

        loaded = self._load(unit)
        length, batch_size = self.max_length(unit), self.options.batch_size
        lm = as_lm_eval(self.model, self.tokenizer, batch_size=batch_size, max_length=length)
        # lm-eval's bootstrap in this process: by itself it forks one that may hold a GPU.
        os.environ["DISABLE_MULTIPROC"] = "1"
        results = lm_evaluate(
            lm=lm, task_dict=loaded, limit=self.options.limit, bootstrap_iters=_BOOTSTRAP, log_samples=True
        )
        if unit.length is not None:
            ruler.keep_real(results, unit.task, unit.length)
        # What lm-eval's own command line adds, and readers of its files look for.
        return dict(results) | {
            "config": {
                "model": "hf",
                "model_args": {"pretrained": self.options.model},
                "batch_size": self.options.batch_size,
                "device": str(self.model.device),
                "limit": self.options.limit,
                "bootstrap_iters": _BOOTSTRAP,
            },
            "date": time.time(),
            "lm_eval_version": version("lm_eval"),
            "transformers_version": version("transformers"),
        }

    def _load(self, unit: Unit) -> Any:
        """The task with its data, drawn anew from the seed, so that it does not depend on what ran before."""
        if unit.task in self.unreachable:
            raise OSError(self.unreachable[unit.task])
        seed, given = self.options.seed, self.options.shots
        if unit.length is not None:
            if self.positions is not None and unit.length > self.positions:
                raise ValueError(
                    f"the model has learned positions for {self.positions} tokens, got lengths {unit.length}"
                )
            ruler.check_length(unit.task, unit.length, self.tokenizer)
            ruler.prepare(unit.task, seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.metadata.pop("max_seq_lengths", None)
        if unit.length is not None:
            self.metadata["max_seq_lengths"] = [unit.length]
        # Examples in prompts are drawn from all questions.
        limit = self.options.limit if unit.length is not None and not given else None
        try:
            with short_timeouts(), ruler.limited(unit.task, limit):
                loaded = self.manager.load([unit.task])
        except OSError as error:
            # Of a task of several lengths: that it cannot be downloaded need not be found out for each.
            self.unreachable[unit.task] = str(error)
            raise
        for task in loaded["tasks"].values():
            shots = task.get_config("num_fewshot")
            # As lm-eval's command line does it: 0 in a task's definition means that it has no examples to give.
            if shots != 0 and (given is not None or shots is None):
                task.set_config(key="num_fewshot", value=given or 0)
            task.set_fewshot_seed(seed=seed)
            if unit.length is not None:
                ruler.check_questions(unit.task, unit.length, task.eval_docs)
        return loaded


def _checksum(path: Path) -> str:
    """Of the user's own text.

    Raises:
        ValueError, OSError: there is none.
    """
    documents = [text for text in texts(path) if text.strip()]
    if not documents:
        raise ValueError(f"text: {path} holds no text")
    return sha256("\0".join(documents).encode()).hexdigest()[:16]
