"""Checks of a model's tokens, labels and options. Each raises a `ValueError` that names the argument."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..kernels.validation import check_tensor, is_readable

logger = logging.get_logger(__name__)

_INTEGERS = (torch.int32, torch.int64)


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> Tensor:
    """The one of the two that was given.

    Raises:
        ValueError: none or both were, or it is not ``[B, T]`` integers or ``[B, T, hidden]`` floating-point numbers
            with at least one token.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if input_ids is not None:
        check_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in _INTEGERS:
            raise ValueError(
                "input_ids must be [B, T] int32 or int64 with at least one token, "
                f"got {input_ids.dtype} of shape {list(input_ids.shape)}"
            )
        return input_ids
    check_tensor("inputs_embeds", inputs_embeds)
    states = cast(Tensor, inputs_embeds)
    fits = states.ndim == 3 and states.shape[1] > 0 and states.shape[2] == hidden_size
    if not fits or not states.is_floating_point():
        raise ValueError(
            f"inputs_embeds must be [B, T, {hidden_size}] floating-point numbers with at least one token, "
            f"got {states.dtype} of shape {list(states.shape)}"
        )
    return states


def embed(embed_tokens: nn.Module, input_ids: Tensor, vocab_size: int) -> Tensor:
    """``embed_tokens(input_ids)``.

    Raises:
        ValueError: a token is out of range, which is seen on a CPU; a GPU stops with an error of its own.
    """
    try:
        return embed_tokens(input_ids)
    except IndexError as error:
        least, most = input_ids.min().item(), input_ids.max().item()
        raise ValueError(f"input_ids must be in [0, {vocab_size}), got from {least} to {most}") from error


def check_logits_to_keep(logits_to_keep: object) -> None:
    """Raise a `ValueError` unless it is a number of tokens or a list of their indices."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim == 1 and logits_to_keep.dtype in (*_INTEGERS, torch.bool):
            return
        got = f"{logits_to_keep.dtype} of shape {list(logits_to_keep.shape)}"
    elif isinstance(logits_to_keep, int | torch.SymInt):
        if logits_to_keep >= 0:
            return
        got = f"{logits_to_keep}"
    else:
        got = type(logits_to_keep).__name__
    raise ValueError(f"logits_to_keep must be an integer from 0 or a tensor of indices, got {got}")


def check_labels(labels: Tensor, tokens: tuple[int, ...], vocab_size: int, name: str = "labels") -> None:
    """Raise a `ValueError` unless ``labels`` are int64, one for each of ``tokens``, ``B`` and ``T``, and in range.

    Values are read on a CPU alone: elsewhere that would synchronise. ``name`` is what the message calls them.
    """
    check_tensor(name, labels)
    if labels.shape != tokens or labels.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 and have the shape of the tokens with logits, {list(tokens)}, "
            f"got {labels.dtype} of shape {list(labels.shape)} (logits_to_keep leaves logits of fewer tokens)"
        )
    if is_readable(labels) and not ((labels == -100) | ((labels >= 0) & (labels < vocab_size))).all():
        raise ValueError(
            f"{name} must be -100 or in [0, {vocab_size}), of the vocabulary, got from {labels.min().item()} to "
            f"{labels.max().item()}"
        )


def warn_of_missing_attentions(implementation: str) -> None:
    """Say that attention weights that were asked for will be missing, where they will."""
    if implementation != "eager":
        logger.warning_once(
            "output_attentions=True has no effect: only attn_implementation='eager' holds the attention weights"
        )
