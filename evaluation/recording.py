"""Record what enters forgetting attention in every layer of a model: queries, keys, values and log gates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from foxlm.kernels.argument_types import typed
from foxlm.modeling.attention_implementations import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from foxlm.modeling.layers.attention import FoxAttention


class AttentionInputs(NamedTuple):
    """Inputs of one layer's attention as `forgetting_attention` takes them, detached.

    Attributes:
        layer: index of the layer.
        q: ``[B, T, H, D]`` queries, normalized and rotated as the model does it.
        k: ``[B, T, G, D]`` keys, after token shift.
        v: ``[B, T, G, D]`` values, after token shift.
        log_f: ``[B, T, Hf]`` natural log of the forget gates.
        scale: factor of the logits.
        centers: whether by the rule ``tight`` the model takes `centered` keys to find what may be left out.
        logit_bound: ``U`` that the model gives the rule ``paper``, ``[H]`` or ``[1]`` from the weights of QK-norm; None
            where it is ``scale * max |q| * max |k|`` of what is there.
        sink: key and value of the attention sink, ``[G, D]`` each; None without one.
        after_sink: ``[B, 1, T]`` int64, first key that each query may see after a token that the sink stands for.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    log_f: Tensor
    scale: float
    centers: bool = False
    logit_bound: Tensor | None = None
    sink: tuple[Tensor, Tensor] | None = None
    after_sink: Tensor | None = None

    def first_tokens(self, length: int) -> "AttentionInputs":
        """The first ``length`` tokens."""
        parts = {name: getattr(self, name)[:, :length] for name in ("q", "k", "v", "log_f")}
        after_sink = None if self.after_sink is None else self.after_sink[..., :length]
        return self._replace(**parts, after_sink=after_sink)


@typed
@contextmanager
def record_attention(
    model: nn.Module, take: Callable[[AttentionInputs], None] | None = None
) -> Iterator[list[AttentionInputs]]:
    """Record the attention of every FoX layer in ``model`` while the context is open.

    Meant for analysis: every recorded tensor is kept, unless ``take`` is given, and the gates are computed once more.

    Args:
        model: a FoX model, with any `attn_implementation`. Its forward passes must take whole sequences, without
            padding, packing or a cache of earlier tokens.
        take: called with each layer's attention, in order, before that layer attends. What it does not keep is freed
            before the next layer, so that memory is that of one layer, whatever the depth.

    Yields:
        A list that each forward pass extends by one entry per layer, in order; empty with ``take``.

    Raises:
        ValueError: ``model`` has no FoX layers, or a forward pass has padding, packing or earlier tokens.

    Example:
        >>> with torch.no_grad(), record_attention(model) as layers:
        ...     output = model(input_ids, use_cache=False)
        >>> times = decay_times(layers[0].log_f)
    """
    attentions = [module for module in model.modules() if isinstance(module, FoxAttention)]
    if not attentions:
        raise ValueError(f"model must have FoX attention layers, got {type(model).__name__} with none")
    recorded: list[AttentionInputs] = []
    keep = recorded.append if take is None else take
    gates: dict[int, tuple[Tensor, Tensor | None]] = {}
    name = attentions[0].config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

    def before_layer(module: FoxAttention, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        layout = kwargs["layout"] if "layout" in kwargs else args[1]
        if layout.real_keys is not None or layout.starts is not None:
            raise ValueError("model must be run without padding and packing while its attention is recorded")
        gates[module.layer_idx] = module.log_forget_gates(hidden_states).detach(), layout.after_sink

    def recording(module, query, key, value, attention_mask, **kwargs):
        # A module of another model, or a pass that this context did not see begin, is none of ours.
        recorded = gates.pop(module.layer_idx, None)
        if recorded is not None:
            if key.shape[2] != query.shape[2]:
                raise ValueError(
                    f"model must be run without earlier tokens while its attention is recorded, "
                    f"got {query.shape[2]} queries for {key.shape[2]} keys"
                )
            q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
            centers, bound = module.config.qk_norm == "none", module.logit_bound(query.dtype)
            sink = None if kwargs["sink"] is None else tuple(x.detach() for x in kwargs["sink"])
            log_f, after = recorded
            keep(AttentionInputs(module.layer_idx, q, k, v, log_f, kwargs["scaling"], centers, bound, sink, after))
        return attend(module, query, key, value, attention_mask, **kwargs)

    hooks = [module.register_forward_pre_hook(before_layer, with_kwargs=True) for module in attentions]
    try:
        with replaced_attention(name, recording):
            yield recorded
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced_attention(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have every FoX layer whose attention implementation is ``name`` call ``function`` while the context is open."""
    # The table is FoX's own, and "sdpa" is already an override in it, which must come back.
    overridden = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        if overridden is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = overridden
