"""Deprecated: the former place of `foxlm.evaluation.lm_eval.run`."""

import warnings

from ..lm_eval.run import evaluate

__all__ = ["evaluate"]

warnings.warn("foxlm.evaluation.harness.run is now foxlm.evaluation.lm_eval.run", FutureWarning, stacklevel=2)
