"""Make FoX known to transformers' Auto classes."""

# First, so that a transformers too old is named before an import of its parts fails.
from .versions import OLDEST  # noqa: F401

# isort: split

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_fox import FoxConfig, extend_peft_defaults
from .modeling_fox import (
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
)


def register_fox() -> None:
    """Register the configuration and every model, and extend PEFT's defaults if it is imported; may be repeated."""
    extend_peft_defaults()
    AutoConfig.register(FoxConfig.model_type, FoxConfig, exist_ok=True)
    for auto, model in (
        (AutoModel, FoxModel),
        (AutoModelForCausalLM, FoxForCausalLM),
        (AutoModelForSequenceClassification, FoxForSequenceClassification),
        (AutoModelForTokenClassification, FoxForTokenClassification),
        (AutoModelForQuestionAnswering, FoxForQuestionAnswering),
    ):
        auto.register(FoxConfig, model, exist_ok=True)
