"""foxlm: the Forgetting Transformer (FoX) for the Hugging Face ecosystem.

Importing this package registers FoX with transformers' Auto classes::

    import foxlm
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/to/a/fox/model")
"""

from foxlm import _checkout  # noqa: F401 (first: it lets the imports below find their folders)
from foxlm.modeling import versions as versions_fox  # noqa: F401 (second: it names a transformers that the others cannot import)

# isort: split
from foxlm.kernels.attention import forgetting_attention
from foxlm.kernels.context_parallel.api import context_parallel_attention
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.modeling.cache.paged import FoxPagedCache
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.fused_projections import decoding_weights
from foxlm.modeling.layers.attention import FoxAttention
from foxlm.modeling.layers.block import FoxDecoderLayer
from foxlm.modeling.modeling_fox import (
    FoxForCausalLM,
    FoxForQuestionAnswering,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
    FoxPreTrainedModel,
)
from foxlm.modeling.registration import register_fox

register_fox()

__version__ = "0.1.0"

__all__ = [
    "ContextParallel",
    "FoxAttention",
    "FoxConfig",
    "FoxDecoderLayer",
    "FoxForCausalLM",
    "FoxForQuestionAnswering",
    "FoxForSequenceClassification",
    "FoxForTokenClassification",
    "FoxModel",
    "FoxPagedCache",
    "FoxPreTrainedModel",
    "context_parallel_attention",
    "decoding_weights",
    "forgetting_attention",
]
