"""The Forgetting Transformer (FoX): decoder, language model and task heads."""

# First, so that a transformers too old is named before an import of its parts fails.
from .versions import CACHE, cache_of, one_cache

# isort: split

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from .arguments import DECODER_ARGUMENTS, LOSS_ARGUMENTS, refuse_unknown
from .attention_settings import attention_settings
from .cache.layer_types import check_cache, register_layer_type
from .cache.paged import FoxPagedCache
from .configuration_fox import (
    CONTEXT_PARALLEL_IMPLEMENTATIONS,
    DEFAULT_IMPLEMENTATION,
    FoxConfig,
)
from .decoding_graphs import holds_no_padding
from .decoding_graphs import running as running_graphs
from .generation import FoxGenerationMixin
from .inputs import check_labels, check_logits_to_keep, check_tokens, embed, warn_of_missing_attentions
from .layers.block import FoxDecoderLayer
from .layers.fused_projections import fuse_projections
from .layers.norm import FoxRMSNorm
from .layers.rotary import FoxRotaryEmbedding
from .losses import FoxLMHead, forget_aux_loss, loss_in_chunks, number_of_targets, targets_of_shard
from .pretrained import FoxPreTrainedModel
from .token_layout import LAYER_TYPE, token_layout

if TYPE_CHECKING:
    from ..kernels.context_parallel.group import ContextParallel
    from ..kernels.context_parallel.sequence import ShardedSequence


def _activation_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of what a projection of ``hidden_states`` gives, which autocast changes."""
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


@torch.compiler.disable
def _outside_of_graphs(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class FoxModel(FoxPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(FoxDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope_parameters is None else FoxRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.context_parallel: ContextParallel | None = None
        # Whether the next call without gradients is to fuse projections, and whether any may: in a model that trains,
        # engines and captured graphs may hold addresses of weights.
        self.is_to_fuse = self.fuses_itself = True
        # Before torch.compile traces a forward that makes a cache: it guards the table that this writes to.
        register_layer_type(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: ``[B, T]`` int64 tokens; this or ``inputs_embeds``.
            attention_mask: ``[B, Tk]``, nonzero for real tokens and zero for padding anywhere, over all tokens so far.
                A 4-D mask is refused: a branch that a query may not see would still decay what it may see.
            position_ids: ``[B or 1, T]``; read by RoPE, and where they restart, with an empty cache, a new
                packed sequence begins.
            cache: of earlier tokens; takes in these.
            inputs_embeds: ``[B, T, hidden]`` instead of tokens.
            use_cache: whether to return a cache.
            past_key_values: the older name of ``cache``.
            cu_seq_lens_q (in ``kwargs``): ``[N + 1]`` offsets of the sequences packed in a batch of one, as
                `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` gives them.

        With context parallelism (`set_context_parallel`) arguments are of the whole sequence, the same on all ranks,
        and results are of this rank's tokens.

        Raises:
            TypeError: an argument is not known here; the message names it.
            ValueError: an argument is not as above; the message names it.
        """
        refuse_unknown(FoxModel.forward, kwargs, DECODER_ARGUMENTS)
        if kwargs.get("output_attentions"):
            warn_of_missing_attentions(self.config._attn_implementation)
        cache = one_cache(cache, past_key_values)
        given = check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        tokens = (given.shape[0], given.shape[1])
        shards = None
        if self.context_parallel is not None:
            mask = attention_mask if isinstance(attention_mask, Tensor) else None
            packing = kwargs.get("cu_seq_lens_q")
            self.context_parallel.check_same(
                tokens=given, attention_mask=mask, position_ids=position_ids, cu_seq_lens_q=packing
            )
            shards = self._shards(self.context_parallel, tokens[1], cache)
            given, use_cache = shards.take(given), False
        if isinstance(cache, FoxPagedCache) and is_torchdynamo_compiling() and not self._steps_in_graph(cache, tokens):
            arguments = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
            arguments |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "cache": cache}
            return _outside_of_graphs(self.forward, **arguments, **kwargs)
        inputs_embeds = given if input_ids is None else embed(self.embed_tokens, given, self.config.vocab_size)
        if not is_torchdynamo_compiling() and self.is_to_fuse and self.fuses_itself:
            self._fuse_before_inference(inputs_embeds)
        if cache is not None:
            self._prepare_cache(cache, inputs_embeds, reserved=isinstance(attention_mask, dict))
        elif use_cache:
            cache = DynamicCache(config=self.config)
        cu_seqlens = (kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
        token, stands_for = self.config.sink_token_id, None
        if token is not None and input_ids is not None:
            stands_for = input_ids.to(inputs_embeds.device) == token
        device = inputs_embeds.device
        if isinstance(attention_mask, Tensor) and not is_torchdynamo_compiling() and holds_no_padding(cache):
            # To look again at each chunk of a prompt would wait for the GPU.
            attention_mask = {LAYER_TYPE: None}
        layout = token_layout(tokens, device, attention_mask, position_ids, cu_seqlens, cache, stands_for=stands_for)
        position_embeddings = None
        if self.rotary_emb is not None:
            if position_ids is None:
                position_ids = layout.rope_positions(counts_padding=self.config.attention_sink == "none")
            if shards is not None:
                position_ids = shards.take(position_ids)
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        if shards is not None:
            layout = layout.shard(shards)

        settings = attention_settings(self.config, self.training or torch.is_grad_enabled())
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                layout=layout,
                position_embeddings=position_embeddings,
                settings=settings,
                **{CACHE: cache},
            )
        if isinstance(cache, FoxPagedCache) and not is_torchdynamo_compiling():
            cache.settle()
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE: cache if use_cache else None},
        )

    def _fuse_before_inference(self, inputs_embeds: Tensor) -> None:
        """Fuse projections if this is inference on kernels; never again if it is training."""
        from ..kernels.backends import PYTORCH, elementwise_backend_of

        if self.training or torch.is_grad_enabled():
            self.fuses_itself = not (self.training and torch.is_grad_enabled())
        elif elementwise_backend_of(inputs_embeds) is not PYTORCH:
            # A graph that is captured without a call before it keeps the addresses of now.
            self.fuses_itself = not (inputs_embeds.is_cuda and torch.cuda.is_current_stream_capturing())
            if self.fuses_itself:
                fuse_projections(self)
                self.is_to_fuse = False

    def train(self, mode: bool = True) -> Any:
        self.fuses_itself &= not mode
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # What was fused may have moved.
        self.is_to_fuse = True
        return self

    def _prepare_cache(self, cache: Cache, inputs_embeds: Tensor, reserved: bool) -> None:
        """Check the cache; a paged one learns the bounds of queries and makes room, unless it has (``reserved``)."""
        check_cache(cache, self.config, len(inputs_embeds))
        if self.gradient_checkpointing and self.training and cache.get_seq_length() > 0:
            # transformers takes the cache away from checkpointed layers: tokens would lose the keys before them.
            raise ValueError(f"{CACHE} must be empty in training with gradient checkpointing")
        if isinstance(cache, FoxPagedCache) and not is_torchdynamo_compiling():
            layers, dtype = [cast(FoxDecoderLayer, x) for x in self.layers], _activation_dtype(inputs_embeds)
            weights = [x.weights_of_bounds() for x in layers]
            cache.take_bounds(weights, dtype, lambda: [x.logit_bounds(dtype) for x in layers])
            if not reserved:
                cache.reserve(inputs_embeds.shape[1])

    def _steps_in_graph(self, cache: FoxPagedCache, tokens: tuple[int, int]) -> bool:
        """Whether the decode kernels take these tokens; everything else that a paged cache does synchronises."""
        from ..kernels.backends import backend_of

        heads, kv_heads, head_dim = self.config.heads
        q = self.norm.weight[:1].expand(*tokens, heads, head_dim)
        runs_fox = cache.is_initialized and self.config._attn_implementation == DEFAULT_IMPLEMENTATION
        return runs_fox and backend_of(q).can_decode(q, kv_heads)

    def _shards(self, context: "ContextParallel", length: int, cache: Cache | None) -> "ShardedSequence":
        if cache is not None:
            raise ValueError(
                f"{CACHE} must be None with context parallelism, which is for whole sequences; "
                "set_context_parallel(None) before generate"
            )
        implementation = self.config._attn_implementation
        if implementation not in CONTEXT_PARALLEL_IMPLEMENTATIONS:
            raise ValueError(
                f"with context parallelism attn_implementation must be one of {list(CONTEXT_PARALLEL_IMPLEMENTATIONS)},"
                f" got {implementation!r}"
            )
        return context.shards(length)


class FoxForCausalLM(FoxPreTrainedModel, FoxGenerationMixin):
    """FoX with a language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FoxConfig) -> None:
        super().__init__(config)
        self.model = FoxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = FoxLMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Arguments as for [`FoxModel.forward`], and

        Args:
            labels: ``[B, T]`` int64 targets, shifted inside; -100 is ignored.
            logits_to_keep: logits of the last so many tokens, or of the tokens at these indices; 0 is all.

        Example:
            >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2))
            >>> model(torch.tensor([[1, 2, 3]])).logits.shape
            torch.Size([1, 3, 50304])
        """
        refuse_unknown(FoxForCausalLM.forward, kwargs, DECODER_ARGUMENTS, LOSS_ARGUMENTS)
        cache = one_cache(cache, past_key_values)
        if not is_torchdynamo_compiling() and (graphs := running_graphs(self)) is not None:
            plain = inputs_embeds is None and labels is None and use_cache is not False and not any(kwargs.values())
            options = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
            logits = graphs.step(partial(FoxForCausalLM.forward, self), cache, input_ids, plain, **options)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
        targets = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        if labels is None and targets.get("shift_labels") is not None:
            raise ValueError("shift_labels must be given with labels, which say that there is a loss, got labels None")
        check_logits_to_keep(logits_to_keep)
        coefficient = self.config.forget_aux_loss_coef if self.training and labels is not None else 0.0
        if coefficient:
            kwargs["output_forget_gate_logits"] = True
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        context = self.model.context_parallel
        logits = loss = None
        chunk_size = self.config.loss_chunk_size if self.training and labels is not None else None
        if chunk_size is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if context is not None and kept != slice(0, None):
                raise ValueError(f"logits_to_keep must be 0 with context parallelism, got {logits_to_keep}")
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if labels is not None:
            loss = self._loss(outputs.last_hidden_state, logits, labels, **targets)
            if coefficient:
                loss = loss + coefficient * self._forget_aux_loss(outputs, attention_mask, labels, **targets)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: cache_of(outputs)},
        )

    def _loss(self, hidden_states: Tensor, logits: Tensor | None, labels: Tensor, **targets: Any) -> Tensor:
        """The language-model loss; from ``logits``, or in chunks from ``hidden_states`` if they are None."""
        options = targets | {"labels": labels}
        shards = None
        if (context := self.model.context_parallel) is None:
            tokens = hidden_states.shape[:2] if logits is None else logits.shape[:2]
            for name, given in (("labels", labels), ("shift_labels", targets.get("shift_labels"))):
                if given is not None:
                    check_labels(given, tokens, self.config.vocab_size, name)
            options["num_items_in_batch"] = number_of_targets(
                labels, targets.get("shift_labels"), targets.get("num_items_in_batch")
            )
        else:
            shards = context.shards(labels.shape[1])
            options = targets_of_shard(shards, **options)
        options["vocab_size"] = self.config.vocab_size
        if logits is None:
            chunk_size = self.config.loss_chunk_size
            assert chunk_size is not None, "else there are logits"
            loss = loss_in_chunks(hidden_states, self.lm_head, self.loss_function, chunk_size, **options)
        else:
            loss = self.loss_function(logits=logits, **options)
        return loss if shards is None else shards.sum(loss)

    def _forget_aux_loss(
        self,
        outputs: BaseModelOutputWithPast,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        if not self.config.gates_learn:
            raise ValueError(f"forget_aux_loss_coef must be 0 with forget_gate {self.config.forget_gate!r}")
        gate_logits = outputs["forget_gate_logits"]
        lost = torch.is_grad_enabled() and not any(x.requires_grad for x in gate_logits)
        if lost and self.model.gradient_checkpointing:
            raise ValueError(
                "forget_aux_loss_coef has no gradient through reentrant gradient checkpointing: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or forget_aux_loss_coef to 0'
            )
        mask = attention_mask[LAYER_TYPE] if isinstance(attention_mask, dict) else attention_mask
        real = None if mask is None else mask[:, -labels.shape[1] :].bool()
        # With gradient accumulation the losses of micro-batches are added up, each weighted by its number of targets.
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        weight: Tensor | float = 1.0
        if num_items_in_batch is not None:
            weight = (targets != -100).sum() / number_of_targets(labels, shift_labels, num_items_in_batch)
        if (context := self.model.context_parallel) is None:
            return weight * forget_aux_loss(gate_logits, real)
        shards = context.shards(labels.shape[1])
        if num_items_in_batch is not None:
            weight = weight / context.ranks
        return weight * forget_aux_loss(gate_logits, None if real is None else shards.take(real), shards.sum)


# transformers' task heads make their decoder by `AutoModel.from_config`, which refuses remote code even if the user
# trusts it. So each head makes its modules itself, under the same names.


class FoxForSequenceClassification(GenericForSequenceClassification, FoxPreTrainedModel):
    """FoX with a classifier of whole sequences."""

    _sees_whole_sequences = True

    def __init__(self, config: FoxConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = FoxModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FoxForTokenClassification(GenericForTokenClassification, FoxPreTrainedModel):
    """FoX with a classifier of tokens."""

    _sees_whole_sequences = True

    def __init__(self, config: FoxConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = FoxModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class FoxForQuestionAnswering(GenericForQuestionAnswering, FoxPreTrainedModel):
    """FoX with an extractive question-answering head."""

    _sees_whole_sequences = True

    def __init__(self, config: FoxConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = FoxModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "FoxForCausalLM",
    "FoxForQuestionAnswering",
    "FoxForSequenceClassification",
    "FoxForTokenClassification",
    "FoxModel",
    "FoxPreTrainedModel",
]
