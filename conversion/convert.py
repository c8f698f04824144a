"""Any checkpoint of FoX by others as a folder that ``from_pretrained`` loads."""

import json
import shutil
import tempfile
from pathlib import Path

from foxlm.conversion.authors import AUTHORS_MODEL_TYPE, convert_authors_checkpoint
from foxlm.conversion.fla import FLA_MODEL_TYPE, convert_fla_checkpoint
from foxlm.modeling.modeling_fox import FoxForCausalLM

_CONVERSIONS = {AUTHORS_MODEL_TYPE: convert_authors_checkpoint, FLA_MODEL_TYPE: convert_fla_checkpoint}
# What turns text to tokens and back is as it was.
_KEPT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


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
    source, out = Path(source), Path(out)
    if out.exists():
        raise ValueError(f"OUT must be a new folder, got {out}, which is there already")
    model = convert_checkpoint(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        folder = Path(unfinished) / out.name
        model.save_pretrained(folder)
        for pattern in _KEPT:
            for file in source.glob(pattern):
                shutil.copy2(file, folder / file.name)
        folder.rename(out)
