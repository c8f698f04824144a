"""What chosen tokens of a text can still see: which tokens, and their text piece by piece."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

# A character is at most 4 bytes; what is longer in coming is none.
_LONGEST_CHARACTER = 4


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text.

    A character that several tokens make stands at the last of them, and the others are empty.
    """
    found, start, read = [], 0, 0
    for index in range(len(ids)):
        before, after = (_decoded(tokenizer, ids[start:end]) for end in (read, index + 1))
        pending = index + 1 - read
        if after.endswith("�") and pending < _LONGEST_CHARACTER:
            found.append("")
            continue
        found.append(after[len(before) :])
        # Decoded together with the piece before: some tokenizers drop a space that begins a text.
        start, read = read, index + 1
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def choose_queries(pieces: Sequence[str] | None, length: int, count: int = 4) -> np.ndarray:
    """Tokens to show what they see: in the second half of the text, the last of them near its end.

    Args:
        pieces: text of each token; tokens that have letters are preferred. None without text.
        length: tokens of the text.
        count: how many.

    Returns:
        ``[count]`` int64, ascending.
    """
    found = []
    for wanted in np.linspace(length / 2, length - 1, count).astype(np.int64).tolist():
        nearby = range(wanted, max(0, wanted - 24), -1)
        letters = [index for index in nearby if pieces is not None and any(c.isalpha() for c in pieces[index])]
        found.append(letters[0] if letters else wanted)
    return np.unique(np.array(found, dtype=np.int64))


def choose_heads(decay_times: np.ndarray) -> list[tuple[str, int, int]]:
    """A head that forgets fast, a medium one, and the slowest: their kind, layer and index.

    Args:
        decay_times: ``[L, H]`` tokens; may hold ``inf``.
    """
    order = np.argsort(decay_times, axis=None, kind="stable")
    picked = (("fast", len(order) // 4), ("medium", (3 * len(order)) // 4), ("slowest", len(order) - 1))
    found: dict[int, tuple[str, int, int]] = {}
    for kind, place in picked:
        layer, head = divmod(int(order[place]), decay_times.shape[1])
        # With few heads two kinds may be one; the last name says more.
        found[int(order[place])] = (kind, layer, head)
    return list(found.values())
