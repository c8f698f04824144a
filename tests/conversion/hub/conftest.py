"""A model's folder that can be published as it is, and a copy of it to be spoilt."""

import shutil
from pathlib import Path

import pytest
import torch

from foxlm.conversion.hub.model_card import write_model_card
from foxlm.evaluation.demo.tokenizer import VOCAB_SIZE, byte_tokenizer
from models import tiny_model


@pytest.fixture(scope="session")
def publishable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: see `folder`."""
    folder = tmp_path_factory.mktemp("publishable") / "model"
    tiny_model(vocab_size=VOCAB_SIZE, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_model_card(folder, license="apache-2.0", training_data="Nothing: its weights are random.")
    return folder


@pytest.fixture
def folder(publishable: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(publishable, tmp_path / "model"))
