"""Prompts of the needle-in-a-haystack test: a sentence hidden in a long text, and a question about it at its end.

The test is Greg Kamradt's (github.com/gkamradt/LLMTest_NeedleInAHaystack), with the words around the question of its
version in LongAlign (github.com/THUDM/LongAlign) and the easy mode that the Forgetting Transformer's authors added for
base models (arXiv 2503.02130, section 4; github.com/zhixuan-lin/forgetting-transformer, eval/niah). Theirs has one
needle, in essays by Paul Graham, and a language model as judge; here needles differ from sample to sample, so that
finding one is no luck, and answers are compared with what was hidden. The first sample's needle is the original one.
"""

import itertools
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .text import documents, token_ids

MODES = ("easy", "standard", "chat")
# Samples begin within so many tokens of the haystack, however long it is: a longer length must not change the others.
STARTS = 2**16

_ASK = (
    "\n\nThere is an important piece of information hidden inside the above document. Now that you've read the "
    "document, I will quiz you about it. Answer the following question: "
)
_ORIGINAL = ("San Francisco", "eat a sandwich and sit in Dolores Park on a sunny day")


def _lists(text: str) -> list[list[str]]:
    """The words of each paragraph, with commas between them."""
    return [" ".join(paragraph.split()).split(", ") for paragraph in text.split("\n\n")]


# Where it is best to do what, and what else, and when.
_CITIES, _FIRST, _SECOND, _WHEN = _lists("""
Lisbon, Nairobi, Toronto, Osaka, Helsinki, Lima, Cairo, Prague, Dublin, Hanoi, Seattle, Oslo, Warsaw, Havana,
Madrid, Sydney, Chicago, Athens, Mumbai, Vienna, Quito, Boston, Seoul, Rome

eat a sandwich, rent a bicycle, buy fresh bread, listen to the street band, climb the old tower, drink lemon tea,
sketch the bridges, feed the ducks, play chess with a stranger, ride the yellow tram, taste the grilled corn,
read a mystery novel

sit in the rose garden, walk along the harbor, visit the clock museum, watch the boats, cross the north bridge,
rest under the chestnut trees, look at the murals, stroll through the fish market, swim in the salt pool,
wait for the lighthouse to turn on, follow the canal, take the ferry

on a sunny day, before breakfast, after the rain, on a quiet Sunday, at sunset, in early spring,
during the lantern festival, on the first day of snow
""")
# Who did what to what, where, and what then.
_SENTENCE = _lists("""
The miller, A young clerk, The old gardener, My neighbor, The captain, A tired painter, The schoolteacher,
One of the sailors, The baker's son, A careful surgeon, The night watchman, An apprentice

carried, repaired, forgot, measured, painted, described, sold, polished, borrowed, hid, sketched, weighed

a brass lamp, the wooden ladder, two letters, a basket of plums, the broken clock, an iron key, a map of the coast,
the blue curtain, a sack of flour, the oldest violin, three silver coins, a torn flag

near the well, behind the stable, at the edge of the forest, in the empty hall, beside the river,
on the upper floor, by the garden wall, under the arch, across the courtyard, next to the chapel

and nobody asked why, before the others woke up, while the wind grew stronger, and went home in silence,
as the bells began to ring, though it was already late, and wrote it down, until the fire went out
""")


class Needle(NamedTuple):
    """What is hidden: ``question`` is answered by ``statement``, which is ``start`` followed by ``answer``."""

    question: str
    start: str
    answer: str

    @property
    def statement(self) -> str:
        return f"{self.start} {self.answer}."


def draw_needle(seed: int, sample: int) -> Needle:
    """The needle of a sample: the original one for sample 0."""
    drawn = random.Random(f"needle {seed} {sample}")
    city, what = _ORIGINAL
    if sample:
        what = f"{drawn.choice(_FIRST)} and {drawn.choice(_SECOND)} {drawn.choice(_WHEN)}"
        city = drawn.choice(_CITIES)
    return Needle(f"What is the best thing to do in {city}?", f"The best thing to do in {city} is", what)


def synthetic_text(seed: str, sentences: int) -> str:
    """Plain English of random made-up sentences in paragraphs, without any city."""
    drawn = random.Random(f"haystack {seed}")
    made = (" ".join(map(drawn.choice, _SENTENCE)) for _ in range(sentences))
    return "".join(sentence + (".\n\n" if index % 6 == 5 else ". ") for index, sentence in enumerate(made))


def haystack_tokens(
    text: Path | None, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int
) -> tuple[np.ndarray, int]:
    """The documents of ``text`` after each other, or made-up text, to hide needles in.

    Returns:
        ``[N]`` int64, at least ``tokens``, and after how many of them the text begins again; 0 if it does not.
    """
    made_up = (token_ids(tokenizer, synthetic_text(f"{seed} {part}", sentences=600)) for part in itertools.count())
    found: list[np.ndarray] = []
    total = 0
    for document in made_up if text is None else documents(text, tokenizer):
        found.append(document)
        total += len(document)
        if total >= tokens:
            return np.concatenate(found), 0
    if not total:
        raise ValueError(f"{text} holds no text to hide a needle in")
    return np.concatenate(found * -(-tokens // total)), total


class PromptMaker:
    """Makes prompts of an exact number of tokens.

    Args:
        tokenizer: of the model; for ``chat`` it must have a chat template.
        mode: ``easy`` hides question and answer, ``standard`` and ``chat`` only the answer. The first two end with the
            question and the beginning of the answer, for the model to go on; ``chat`` asks by the chat template.
        haystack: ``[N]`` tokens, at least `STARTS` more than a prompt has.
        seed: of needles and of where in the haystack a sample begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: str, haystack: np.ndarray, seed: int) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError("mode chat needs a tokenizer with a chat template; use easy or standard for base models")
        self.tokenizer, self.mode, self.haystack, self.seed = tokenizer, mode, haystack, seed
        self._borders = _sentence_ends(haystack, tokenizer)

    def prompt(self, sample: int, length: int, depth: float) -> tuple[np.ndarray, np.ndarray]:
        """A prompt of ``length`` tokens, at least `least`, and the tokens that should follow it, ``[N]`` int64.

        The needle stands behind ``depth`` of the haystack, at the end of a sentence: the last one up to there.
        """
        before, hidden, after, answer = self._parts(sample)
        room = length - len(before) - len(hidden) - len(after)
        start = random.Random(f"start {self.seed} {sample}").randrange(STARTS)
        hay = self.haystack[start : start + room]
        cut = int(depth * room)
        if depth not in (0, 1):
            # The last border up to there, as Kamradt's test looks for one backwards.
            index = np.searchsorted(self._borders, start + round(depth * room), side="right") - 1
            cut = max(0, int(self._borders[index]) - start) if index >= 0 else 0
        return np.concatenate([before, hay[:cut], hidden, hay[cut:], after]), answer

    def least(self, samples: int) -> int:
        """Tokens of the shortest prompt that has room for a haystack in each of the samples."""
        return 1 + max(sum(map(len, self._parts(sample)[:3])) for sample in range(samples))

    def answer_tokens(self, samples: int) -> int:
        """Most tokens that an answer of the samples has."""
        return max(len(self._parts(sample)[3]) for sample in range(samples))

    def _parts(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What stands before the haystack, the needle, what stands behind the haystack, and the answer to that."""
        needle = draw_needle(self.seed, sample)
        asked = f"{needle.question} Answer: " if self.mode == "easy" else ""
        hidden = token_ids(self.tokenizer, f"\n{asked}{needle.statement}\n")
        if self.mode != "chat":
            # The token that begins a text, where the tokenizer puts one.
            first = self.tokenizer("a")["input_ids"][:1]
            before = np.array(first if first == [self.tokenizer.bos_token_id] else [], dtype=np.int64)
            asking = f"{_ASK}{needle.question} Answer: {needle.start}"
            return before, hidden, *self._pair(asking, f" {needle.answer}.")
        place = "<the document>"
        messages = [{"role": "user", "content": f"{place}{_ASK}{needle.question}"}]
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, found, after = whole.partition(place)
        if not found:
            raise ValueError("mode chat needs a chat template that leaves the text of a message as it is")
        return token_ids(self.tokenizer, before), hidden, *self._pair(after, needle.statement)

    def _pair(self, text: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """``text`` and what follows it, in the tokens of both together where they divide between the two."""
        first, both = token_ids(self.tokenizer, text), token_ids(self.tokenizer, text + continuation)
        if np.array_equal(both[: len(first)], first):
            return first, both[len(first) :]
        return first, token_ids(self.tokenizer, continuation)


def _sentence_ends(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Indices behind which a sentence or line ends, ascending, counted as numbers of tokens before."""
    known, which = np.unique(tokens, return_inverse=True)
    texts = [tokenizer.decode([int(token)]) for token in known]
    ends = np.array([text.endswith("\n") or text.rstrip().endswith((".", "!", "?")) for text in texts], dtype=bool)
    return np.flatnonzero(ends[which]) + 1
