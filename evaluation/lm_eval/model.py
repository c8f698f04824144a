"""A model as lm-eval takes it, and what lm-eval must be told about it."""

import logging
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def as_lm_eval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int) -> Any:
    """lm-eval's `HFLM` around a loaded model: likelihoods padded on the right, generation on the left.

    Args:
        model: on its device.
        tokenizer: of the model.
        batch_size: prompts per forward pass.
        max_length: tokens of prompt and answer together; lm-eval cuts longer prompts on the left.
    """
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval")
    level = log.level
    # It warns that arguments for loading do not matter when a loaded model is given.
    log.setLevel(logging.ERROR)
    try:
        return HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
        )
    finally:
        log.setLevel(level)


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if batches of this tokenizer's tokens cannot be made, or hold tokens the model has not."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}: they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which lm-eval needs")


def own_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length that lm-eval takes by itself: ``max_position_embeddings`` of the configuration, or 2048."""
    return as_lm_eval(model, tokenizer, batch_size=1, max_length=0).max_length
