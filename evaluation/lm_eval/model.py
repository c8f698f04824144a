"""A model as lm-eval takes it, what lm-eval must be told about it, and what identifies it in results."""

import hashlib
import json
import logging
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Fields that say nothing about what is computed, or that stand in results by themselves.
_NOT_COMPUTED = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "acp_eps", "acp_rule")


def as_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int, cache: bool = True
) -> Any:
    """lm-eval's `HFLM` around a loaded model: likelihoods padded on the right, generation on the left.

    Args:
        model: on its device.
        tokenizer: of the model.
        batch_size: prompts per forward pass.
        max_length: tokens of prompt and answer together; lm-eval cuts longer prompts on the left.
        cache: False generates by running the whole text anew for each token.
    """
    from lm_eval.models.huggingface import HFLM

    if not cache:
        _generate_without_cache(model)
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


def _generate_without_cache(model: PreTrainedModel) -> None:
    """lm-eval always asks for a cache."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        return type(model).generate(model, *args, **(kwargs | {"use_cache": False}))

    model.generate = generate


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


def fingerprint(model: PreTrainedModel) -> str:
    """A checksum of configuration and weights as loaded, wherever they came from; pruning is not part of it."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_COMPUTED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        # Sums of the bits as whole numbers, which do not depend on the order of summation.
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {bits}".encode())
    return digest.hexdigest()[:16]
