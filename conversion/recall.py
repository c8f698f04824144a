"""Rows that ask for what they hold: at their end, passages of the same row again, in another order.

Of plain text a model predicts most tokens from what is near, so that a calibration on it lets heads forget which only a
question needs: those that find a thing in the context and copy it (induction heads: Olsson et al., 2022, "In-context
Learning and Induction Heads"). Of a passage that comes again all tokens but the first are to be found there.
"""

import torch
from torch import Tensor

from foxlm.kernels.argument_types import typed
from foxlm.kernels.validation import is_number

# Tokens of a passage: a sentence or two, so that few of its tokens are those by which it must be recognised.
PASSAGE = 32


def recalled(length: int, share: float) -> int:
    """Tokens at the end of a row of ``length`` that `with_recall` replaces: whole passages, none in a short row."""
    return int(share * length) // PASSAGE * PASSAGE if length > 2 * PASSAGE else 0


@typed
def with_recall(rows: Tensor, share: float, seed: int = 0) -> Tensor:
    """``rows``, so much of each replaced, at its end, by passages of what is before, from random places.

    Args:
        rows: ``[N, T]`` int64 tokens; passages do not hold the first of a row, which may be a separator.
        share: of each row, in [0, 1/2]; passages have 32 tokens.
        seed: of the places.

    Returns:
        ``[N, T]`` int64.

    Raises:
        ValueError: an argument is not as above.
    """
    check_recall(share)
    if rows.ndim != 2 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 tokens [N, T], got {rows.dtype} {list(rows.shape)}")
    tokens = recalled(rows.shape[1], share)
    kept, generator = rows.shape[1] - tokens, torch.Generator().manual_seed(seed)
    rows = rows.clone()
    for row in rows if tokens else ():
        starts = 1 + torch.randperm(kept - PASSAGE, generator=generator)[: tokens // PASSAGE]
        row[kept:] = row[(starts[:, None] + torch.arange(PASSAGE)).flatten().to(row.device)]
    return rows


def check_recall(share: float) -> None:
    """Raise a `ValueError` that names ``recall`` unless it is a share that `with_recall` takes."""
    if not (is_number(share) and 0.0 <= share <= 0.5):
        raise ValueError(f"recall must be a share of a row in [0, 0.5], got {share!r}")
