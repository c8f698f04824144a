"""The former name of ``foxlm lm-eval``; to be removed in the next release."""

import sys
import warnings

from foxlm.cli import app

if __name__ == "__main__":
    warnings.warn("python -m foxlm.evaluation is now foxlm lm-eval", FutureWarning, stacklevel=1)
    app(["lm-eval", *sys.argv[1:]], prog_name="foxlm")
