"""Where nothing can be downloaded, say so at once: by themselves, libraries try each file for half a minute."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds to wait for an answer.
_PATIENCE = 5.0
_SHORT = 20.0


def go_offline_if_unreachable() -> str | None:
    """Ask the Hub for a sign of life; without one, have this process use only what is on this machine.

    Returns:
        Why nothing can be downloaded, or None if it can.
    """
    import datasets
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached ({error})"
    return None


@contextmanager
def short_timeouts() -> Iterator[None]:
    """For downloads that set no time limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SHORT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
