"""What `foxlm eval` is asked for, checked before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..loading import DTYPES, pruning_changes, resolve_device
from .suites import RULER, SUITES, Suite


@dataclass(frozen=True)
class Options:
    """What to evaluate, and how. Defaults of None are the suite's, the task's or the model's own.

    Attributes:
        model: folder, or name on the Hub.
        out: folder of the results.
        suite: of `SUITES`, or None.
        tasks: more tasks or groups of lm-eval's.
        text: file or folder for tasks of one's own text.
        lengths: tokens of RULER's prompts.
        batch_size: prompts per forward pass.
        max_length: tokens of prompt and answer.
        limit: questions of each task.
        shots: examples in each prompt.
        eps, rule, device, dtype: as of `load_model`.
        seed: of the questions that are drawn.
        include_path: folder with more task definitions.
        samples: write questions and answers too.
        overwrite: replace results of other settings.
    """

    model: str
    out: Path
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    text: Path | None = None
    lengths: tuple[int, ...] | None = None
    batch_size: int = 8
    max_length: int | None = None
    limit: int | None = None
    shots: int | None = None
    eps: float | str = "model"
    rule: str = "model"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    include_path: Path | None = None
    samples: bool = False
    overwrite: bool = False

    def checked(self) -> "Options":
        """The same with the tasks of the suite, and its defaults.

        Raises:
            ValueError: an option cannot be; the message names it.
        """
        if self.suite is None and not self.tasks and self.text is None:
            raise ValueError(f"nothing to evaluate: give suite ({', '.join(SUITES)}), tasks or text")
        if self.suite is not None and self.suite not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("max_length", self.max_length, 2),
            ("limit", self.limit, 1),
            ("shots", self.shots, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"include_path must be a folder, got {self.include_path}")
        if self.text is not None and not self.text.exists():
            raise ValueError(f"text: there is no {self.text}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {self.dtype!r}")
        resolve_device(self.device)
        pruning_changes(self.eps, self.rule)
        suite = SUITES.get(self.suite or "", Suite(()))
        lengths = self.lengths or suite.lengths
        tasks = tuple(dict.fromkeys((*suite.tasks, *self.tasks)))
        if self.max_length is not None and self.max_length < max(lengths) and set(tasks) & set(RULER):
            raise ValueError(
                f"max_length must be at least {max(lengths)}, the longest of lengths, got {self.max_length}"
            )
        shots = suite.shots if self.shots is None else self.shots
        return replace(self, lengths=lengths, tasks=tasks, limit=self.limit or suite.limit, shots=shots)
