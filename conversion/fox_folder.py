"""What a FoX model's folder says that it is."""

from pathlib import Path

from foxlm.conversion.checkpoint_io import read_fields
from foxlm.conversion.formats.format import one_kind_of_error
from foxlm.modeling.configuration_fox import FoxConfig

# By class, the Auto class that loads it and the task as the Hub calls it.
TASKS = {
    "FoxForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "FoxForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "FoxForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "FoxForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "FoxModel": ("AutoModel", "feature-extraction"),
}


def read_config(folder: Path) -> FoxConfig:
    """The configuration in ``folder``; raises a `ValueError` if that is none of a FoX model, or not valid."""
    has_config = (folder / "config.json").is_file()
    if not has_config and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"folder must hold a whole model, got the adapter {folder}; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
        )
    fields = read_fields(folder) if has_config else {}
    if fields.get("model_type") != FoxConfig.model_type:
        raise ValueError(f"folder must hold a config.json with model_type 'fox', got {folder}")
    with one_kind_of_error():
        return FoxConfig.from_dict(fields)


def architecture_of(config: FoxConfig) -> str:
    """The class that a configuration is of; raises a `ValueError` if that is none of ours."""
    named = config.architectures or []
    if len(named) != 1 or named[0] not in TASKS:
        raise ValueError(f"architectures of config.json must be one of {sorted(TASKS)}, got {named}")
    return named[0]
