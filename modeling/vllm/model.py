"""FoX as a model of vLLM: the modules of `modeling_fox`, with attention over vLLM's cache."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import AutoWeightsLoader

from ..configuration_fox import FoxConfig
from ..layers.block import FoxDecoderLayer, FoxMLP
from ..layers.fused_projections import fuse_projections
from ..layers.norm import FoxRMSNorm
from ..layers.rotary import FoxRotaryEmbedding
from ..losses import FoxLMHead
from .adapters import make_adaptable
from .attention import ServedAttention
from .limits import check_limits
from .ranks import config_of_rank, weights_of_rank


class ServedMLP(FoxMLP):
    """`FoxMLP`, summed over the ranks of tensor parallelism."""

    def forward(self, x: Tensor) -> Tensor:
        return tensor_model_parallel_all_reduce(super().forward(x))


class ServedDecoderLayer(FoxDecoderLayer):
    """`FoxDecoderLayer` of the tokens of many requests at once."""

    attention_class = ServedAttention
    mlp_class = ServedMLP

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # A recorded layer would launch again with the pages of another step.
        return self._compute(hidden_states, **kwargs)


class ServedModel(nn.Module):
    """The decoder without a head; its weights have the names of `FoxModel`'s."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ServedDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = FoxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope_parameters is None else FoxRotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, positions: Tensor, stands_for: Tensor | None) -> Tensor:
        """``[T, hidden]`` embeddings and ``[T]`` positions of the tokens of a step to ``[T, hidden]``.

        ``stands_for`` as for `ServedAttention`.
        """
        steps = get_forward_context().attn_metadata
        step = None
        if steps is not None:
            assert isinstance(steps, dict), "`check_limits` refuses microbatches"
            # All layers have the same one.
            step = next(iter(steps.values())).begin()
        hidden_states = hidden_states[None]
        angles = None if self.rotary_emb is None else self.rotary_emb(hidden_states, positions[None])
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=angles, step=step, stands_for=stands_for)
        return self.norm(hidden_states)[0]


class FoxForServing(nn.Module, SupportsLoRA):
    """The language model that vLLM serves for ``FoxForCausalLM``.

    Args:
        vllm_config: of the engine.
        prefix: of the names of its layers, which is empty for a whole model.

    Raises:
        ValueError: the engine is asked for what FoX does not support on it (`check_limits`); the message names it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_limits(config, vllm_config)
        self.config = config
        self.model = ServedModel(config_of_rank(config))
        self.lm_head = FoxLMHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.has_adapters = vllm_config.lora_config is not None
        if self.has_adapters:
            make_adaptable(self, config)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            input_ids: ``[T]`` tokens of all requests of a step, or None with ``inputs_embeds``.
            positions: ``[T]``.
            intermediate_tensors: of pipeline parallelism, which is refused: None.
            inputs_embeds: ``[T, hidden]`` instead of tokens.

        Returns:
            ``[T, hidden]``.
        """
        stands_for = None
        if inputs_embeds is None:
            assert input_ids is not None, "vLLM gives tokens or embeddings"
            inputs_embeds = self.embed_input_ids(input_ids)
            if self.config.sink_token_id is not None:
                stands_for = input_ids == self.config.sink_token_id
        return self.model(inputs_embeds, positions, stands_for)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """``[T, hidden] -> [T, vocabulary]``."""
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take in a checkpoint's weights by name; returns the names."""
        parts = weights_of_rank(weights, dict(self.named_parameters()), self.config)
        names = AutoWeightsLoader(self).load_weights(parts)
        if self.lm_head.weight.is_cuda and not self.has_adapters:
            fuse_projections(self)
        return names
