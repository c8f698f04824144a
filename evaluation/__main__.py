"""lm-eval's own command line with FoX known to transformers: ``python -m foxlm.evaluation run --model hf ...``.

Everything after the module's name goes to lm-eval as it is. Plain ``lm_eval`` cannot load a FoX folder, because it
never imports `foxlm`.
"""

import sys

from .requirements import require_lm_eval


def main() -> None:
    """Run lm-eval; exits with 1 and one line if it is not installed."""
    try:
        require_lm_eval()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from lm_eval.__main__ import cli_evaluate

    # Shown by lm-eval's usage lines, which would otherwise name this file.
    sys.argv[0] = "python -m foxlm.evaluation"
    cli_evaluate()


if __name__ == "__main__":
    main()
