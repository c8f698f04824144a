"""Configuration, class and task of the FoX model in a folder."""

from pathlib import Path

from foxlm.conversion.formats.checkpoint_format import invalid_config_as_value_error
from foxlm.modeling.configuration_fox import FoxConfig
from foxlm.modeling.model_files import read_fields

# Model class: the Auto class that loads it, and its task on the Hub.
TASKS = {
    "FoxForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "FoxForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "FoxForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "FoxForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "FoxModel": ("AutoModel", "feature-extraction"),
}


def read_config(folder: Path) -> FoxConfig:
    """The configuration in ``folder``; raises a `ValueError` if it is invalid or not of a FoX model."""
    has_config = (folder / "config.json").is_file()
    if not has_config and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"folder must hold a whole model, got the adapter {folder}; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
        )
    fields = read_fields(folder) if has_config else {}
    if fields.get("model_type") != FoxConfig.model_type:
        raise ValueError(f"folder must hold a config.json with model_type 'fox', got {folder}")
    with invalid_config_as_value_error():
        return FoxConfig.from_dict(fields)


def architecture_of(config: FoxConfig) -> str:
    """The model class named in a configuration; raises a `ValueError` if it is not a FoX class."""
    named = config.architectures or []
    if len(named) != 1 or named[0] not in TASKS:
        raise ValueError(f"architectures of config.json must be one of {sorted(TASKS)}, got {named}")
    return named[0]
