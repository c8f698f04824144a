"""Any checkpoint of FoX by others as a folder that ``from_pretrained`` loads."""

import json
from pathlib import Path

from foxlm.conversion.authors import AUTHORS_MODEL_TYPE, convert_authors_checkpoint
from foxlm.conversion.fla import FLA_MODEL_TYPE, convert_fla_checkpoint
from foxlm.conversion.new_folder import copy_text_files, new_folder
from foxlm.modeling.modeling_fox import FoxForCausalLM

_CONVERSIONS = {AUTHORS_MODEL_TYPE: convert_authors_checkpoint, FLA_MODEL_TYPE: convert_fla_checkpoint}


def convert_checkpoint(folder: str | Path) -> FoxForCausalLM:
    """The model in ``folder`` (``config.json`` and ``*.safetensors``), whoever's ``model_type`` it is.

    Raises:
        ValueError: nobody's, or it does not fit; the message names what stands in the way.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"folder must hold a config.json, got {folder}")
    model_type = json.loads(file.read_text()).get("model_type")
    if model_type not in _CONVERSIONS:
        raise ValueError(f"model_type must be one of {sorted(_CONVERSIONS)}, got {model_type!r}")
    return _CONVERSIONS[model_type](folder)


def convert_to_folder(source: str | Path, out: str | Path) -> None:
    """Write `convert_checkpoint` of ``source``, and its tokenizer, to the new folder ``out``: whole or not at all.

    Raises:
        ValueError: ``out`` is there already; or as `convert_checkpoint`.
    """
    with new_folder(out) as folder:
        convert_checkpoint(source).save_pretrained(folder)
        copy_text_files(source, folder)
