"""Language models built by hand, whose losses and answers are known."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.modeling.versions import CACHE, cache_of

VOCABULARY = 258


class _Config(PreTrainedConfig):
    def __init__(self, max_position_embeddings: int = 1024, **kwargs: Any) -> None:
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 1
        self.vocab_size = VOCABULARY
        super().__init__(**{"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 257} | kwargs)


class RecallingConfig(_Config):
    model_type = "test_recalling"

    def __init__(self, window: int = 10**9, **kwargs: Any) -> None:
        self.window = window
        super().__init__(**kwargs)


class CountingConfig(_Config):
    model_type = "test_counting"

    def __init__(self, slope: float = 0.01, nan_from: int = 10**9, scale: float = 1.0, **kwargs: Any) -> None:
        self.slope, self.nan_from, self.scale = slope, nan_from, scale
        super().__init__(**kwargs)


def _with_earlier(input_ids: Tensor, cache: Any, use_cache: bool | None) -> tuple[Tensor, Any]:
    """All tokens so far, which a cache holds as if they were keys."""
    if cache is None and not use_cache:
        return input_ids, None
    cache = DynamicCache() if cache is None else cache
    keys = input_ids[:, None, :, None].double()
    return cache.update(keys, keys, 0)[0][:, 0, :, 0].long(), cache


class Recalling(PreTrainedModel, GenerationMixin):
    """Says what followed the last 12 tokens where they stood before, within ``window`` tokens; if nowhere, ``?``."""

    config_class = RecallingConfig

    def __init__(self, config: RecallingConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Tensor, use_cache=None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        everything, cache = _with_earlier(input_ids, kwargs.get(CACHE), use_cache)
        kept = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(len(everything), kept, VOCABULARY)
        for row, tokens in enumerate(everything.tolist()):
            for index in range(kept):
                logits[row, index, self._next(tokens[: len(tokens) - kept + index + 1])] = 20.0
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    def _next(self, tokens: list[int]) -> int:
        seen = "".join(map(chr, tokens[-self.config.window :]))
        found = seen.rfind(seen[-12:], 0, -1)
        return ord("?") if found < 0 else ord(seen[found + 12])


class _Counter(PreTrainedModel):
    config_class = CountingConfig

    def __init__(self, config: CountingConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache=None, **kwargs) -> BaseModelOutputWithPast:
        everything, cache = _with_earlier(input_ids, kwargs.get(CACHE), use_cache)
        end = everything.shape[1]
        before = torch.arange(end - input_ids.shape[1], end) + 1
        states = nn.functional.one_hot((input_ids + 1) % 256, VOCABULARY).float()
        states = states * (self.config.slope * before)[:, None]
        states[:, before >= self.config.nan_from] = float("nan")
        return BaseModelOutputWithPast(last_hidden_state=states, **{CACHE: cache})


class Counting(PreTrainedModel, GenerationMixin):
    """Expects each byte to be one more than that before it, the more firmly the more tokens it has seen."""

    config_class = CountingConfig
    base_model_prefix = "model"

    def __init__(self, config: CountingConfig) -> None:
        super().__init__(config)
        self.model = _Counter(config)
        self.lm_head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache=None, **kwargs: Any) -> CausalLMOutputWithPast:
        out = self.model(input_ids, use_cache, **kwargs)
        logits = self.config.scale * self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache_of(out)})


def counting_losses(length: int, slope: float = 0.01) -> Tensor:
    """Of `Counting` on bytes that count up: ``[length - 1]`` float64, of the token with 1, 2, ... before it."""
    before = torch.arange(1, length, dtype=torch.float64)
    return torch.log1p((VOCABULARY - 1) * torch.exp(-slope * before))


for _config, _model in ((RecallingConfig, Recalling), (CountingConfig, Counting)):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)


def save_recalling(folder: Path, chat: bool = False, **fields: Any) -> str:
    """A folder with a `Recalling` model and the tokenizer of bytes."""
    Recalling(RecallingConfig(**fields)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\\n{% endfor %}[assistant] "
        )
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_counting(folder: Path, **fields: Any) -> str:
    """A folder with a `Counting` model and the tokenizer of bytes."""
    model = Counting(CountingConfig(**fields))
    nn.init.eye_(model.lm_head.weight)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
