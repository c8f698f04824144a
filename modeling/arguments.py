"""The keyword arguments that models take beside those of their signatures; any other is refused.

A model that ignores arguments it does not know is silently wrong: a cache under the name of a later transformers, a
misspelled mask. But transformers passes arguments down from many places, and a decoder receives some that do not
concern it. Those are named here, each with who passes it and why it may be ignored.
"""

import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

DECODER_ARGUMENTS = {
    "output_attentions": "read by transformers' capture_outputs",
    "output_hidden_states": "read by transformers' capture_outputs",
    "output_forget_gate_logits": "read by transformers' capture_outputs",
    "cu_seq_lens_q": "read here",
    "cu_seq_lens_k": "read here",
    "max_length_q": "of DataCollatorWithFlattening; follows from cu_seq_lens_q",
    "max_length_k": "of DataCollatorWithFlattening; follows from cu_seq_lens_k",
    "seq_idx": "of the same and TRL, for packed sequences; follows from position_ids, which come with it",
    "num_items_in_batch": "of Trainer; for the loss, and transformers' task heads pass on all that they are given",
    "token_type_ids": "of tokenizers and pipelines; no weight of FoX depends on the segment of a token",
    "debug_io": "read by transformers' merge_with_config_defaults",
    "debug_io_dir": "read by transformers' merge_with_config_defaults",
    "prune_layers": "read by transformers' merge_with_config_defaults, for debug_io",
}
# What only collators and transformers itself pass: no one has it in mind who mistypes a name.
_INTERNAL = {
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "num_items_in_batch",
    "debug_io",
    "debug_io_dir",
    "prune_layers",
}
LOSS_ARGUMENTS = {
    "num_items_in_batch": "of Trainer; read by the loss",
    "shift_labels": "of Trainer with context parallelism; read by the loss",
}
MASK_ARGUMENTS = {
    "position_ids": "of generate; what a token may see follows from the order of tokens",
    "token_type_ids": "of generate; as for the decoder",
    "is_first_iteration": "of generate; the cache says so",
}


def refuse_unknown(function: Callable, given: Mapping[str, Any], *taken: Mapping[str, str]) -> None:
    """Refuse arguments that nothing reads. None counts as not given, as everywhere in transformers.

    Args:
        function: what was called.
        given: arguments beside those of its signature, by name.
        taken: those that may be.

    Raises:
        TypeError: naming an argument that is not among ``taken``, and one that may be meant.
    """
    unknown = [name for name, value in given.items() if value is not None and not any(name in x for x in taken)]
    if unknown:
        named = [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]
        known = [name for name in dict.fromkeys([*named, *itertools.chain(*taken)]) if name not in _INTERNAL]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
        raise TypeError(f"{function.__qualname__} got an argument that it does not know, {unknown[0]!r}: {hint}")
