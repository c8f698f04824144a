"""Optional packages of the evaluation commands, and what to do without them."""

from importlib.util import find_spec


def require_lm_eval() -> None:
    """Raise `ImportError`, saying how to install it, unless lm-eval is there."""
    _require("lm_eval", "lm-eval")


def require_matplotlib() -> None:
    """Raise `ImportError`, saying how to install it, unless matplotlib is there."""
    _require("matplotlib", "matplotlib")


def _require(module: str, name: str) -> None:
    if find_spec(module) is None:
        raise ImportError(f"{name} is not installed; it comes with: pip install 'foxlm[eval]'")
