"""The parts of the demo: bigrams, the corpus and its windows, the tokenizer, lm-eval's questions."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from byte_models import byte_model
from foxlm.evaluation.demo.corpus import (
    SEPARATOR,
    SourceFile,
    bigram_costs,
    is_held_out,
    load_corpus,
    to_tokens,
    windows,
)
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.evaluation.demo.train import bits_per_byte, random_windows
from foxlm.evaluation.lm_eval.tasks.own_text import CONTINUATION_BYTES, PREFIX_BYTES, next_lines_questions


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def test_bigram_by_hand() -> None:
    # After a: b, b, c. After b: a. The separator starts the text with a.
    stream = np.array([SEPARATOR, 97, 98, 97, 98, 97, 99], dtype=np.uint16)
    bits = bigram_costs(stream)
    assert bits[97, 98] == pytest.approx(-math.log2(3 / 259))
    assert bits[97, 99] == pytest.approx(-math.log2(2 / 259))
    assert bits[98, 97] == pytest.approx(-math.log2(3 / 258))
    assert bits[SEPARATOR, 97] == pytest.approx(-math.log2(2 / 257))
    assert bits[0, 0] == pytest.approx(8.0)
    np.testing.assert_allclose((2.0**-bits).sum(1), 1.0)


def test_corpus_split_is_disjoint_and_depends_on_names_alone() -> None:
    corpus, again = load_corpus(), load_corpus()
    assert corpus == again
    train, held_out = ({file.name for file in files} for files in corpus)
    assert not train & held_out
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.2
    assert not any("/tests/" in name or name.startswith(("test/", "encodings/")) for name in train | held_out)
    counts = corpus.describe()
    assert counts["train_files"] == len(train)
    assert counts["held_out_bytes"] == sum(len(file.data) for file in corpus.held_out)


def test_corpus_needs_both_kinds_of_files(tmp_path) -> None:
    (tmp_path / "alone.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"got [01] and [01] files in"):
        load_corpus(tmp_path)


def test_windows_score_every_byte_once() -> None:
    files = [SourceFile("a", bytes(range(20))), SourceFile("b", b"xy"), SourceFile("c", bytes(range(100, 113)))]
    cut = windows(files, 5, 100)
    assert cut.shape == (8, 5)
    assert cut[:, 1:].ravel().tolist() == [*range(20), *range(100, 112)]
    assert cut[[0, 1, 5], 0].tolist() == [SEPARATOR, 3, SEPARATOR]
    assert len(windows(files, 5, 3)) == 3
    with pytest.raises(ValueError, match="got 99"):
        windows(files, 99, 1)


def test_training_windows_repeat_for_a_seed() -> None:
    stream = to_tokens([SourceFile("a", bytes(range(256)))])
    assert stream.tolist() == [SEPARATOR, *range(256)]
    first, again, other = (random_windows(stream, 16, 8, seed) for seed in (0, 0, 1))
    seen = [[one["input_ids"].tolist() for one in drawn] for drawn in (first, again, other)]
    assert seen[0] == seen[1] != seen[2]


def test_bits_per_byte_is_the_models_own_loss() -> None:
    model = byte_model()
    held_out = tokens(3, 24)
    loss = model(held_out, labels=held_out, use_cache=False).loss.item() / math.log(2)
    assert bits_per_byte(model, held_out.numpy()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("text", ["", " a  b\t\r\n", "é€😀", "<|endoftext|> <|padding|> [UNK]", "\x00\x7f ."])
def test_byte_tokenizer_is_exact(tmp_path, text: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
        assert len(tokenizer) == 258
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)


def test_next_lines_questions_come_from_the_text() -> None:
    documents = [file.data.decode(errors="ignore") for file in load_corpus().held_out]
    questions = next_lines_questions(documents, 20, seed=0)
    assert questions == next_lines_questions(documents, 20, seed=0)
    assert len(questions) == 20
    text = "\0".join(documents)
    for question in questions:
        right = question["choices"][question["answer"]]
        assert question["prefix"] + right in text
        assert question["prefix"].endswith("\n") and len(question["prefix"]) >= PREFIX_BYTES
        assert {len(choice) for choice in question["choices"]} == {CONTINUATION_BYTES}
        assert len(set(question["choices"])) == 4
    with pytest.raises(ValueError, match="at least 4 passages"):
        next_lines_questions(["x"], 1, seed=0)
