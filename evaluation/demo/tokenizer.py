"""A byte-level tokenizer as `AutoTokenizer` loads it from a folder: token ids are the UTF-8 bytes of the text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .corpus import SEPARATOR

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
VOCAB_SIZE = SEPARATOR + 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens 0..255 are bytes, 256 separates texts (beginning and end of text), 257 is padding.

    Exact: no prefix space, no normalization, and text that spells a special token is still bytes.
    ByT5's tokenizer is not used because it appends an end of text to every prompt.
    """
    characters = _byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    # Byte-pair encoding without a merge: each byte stays a token.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in `pre_tokenizers.ByteLevel` (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]
