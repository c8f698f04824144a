"""Find the sub-packages of a checkout or an editable install, where they stand beside this folder, not in it."""

from pathlib import Path

import foxlm

_HERE = Path(__file__).resolve().parent

if not (_HERE / "modeling").is_dir():
    foxlm.__path__.append(str(_HERE.parent))
