"""Optional packages of the evaluation commands, and what to do without them."""

from importlib.util import find_spec


def require(package: str) -> None:
    """Raise `ImportError`, saying how to install it, unless ``package`` is there."""
    if find_spec(package.replace("-", "_")) is None:
        raise ImportError(f"{package} is not installed; it comes with: pip install 'foxlm[eval]'")
