"""Deprecated: the former place of `foxlm.evaluation.lm_eval.options`."""

import warnings

from ..lm_eval.options import Options

__all__ = ["Options"]

warnings.warn("foxlm.evaluation.harness.options is now foxlm.evaluation.lm_eval.options", FutureWarning, stacklevel=2)
