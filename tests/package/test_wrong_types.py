"""Every documented function names the argument that is of a wrong type."""

import importlib
import inspect
import itertools
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from base_models import base
from foxlm.evaluation.lm_eval.options import Options
from foxlm.evaluation.recording import record_attention
from models import tiny_model, tokens

MAKE_API = Path(__file__).parents[2] / "docs" / "make_api.py"
SECTIONS: dict[str, dict[str, list[str]]] = runpy.run_path(str(MAKE_API))["SECTIONS"]

MODEL = tiny_model("pro", dtype=torch.float32)
LONG = torch.zeros(1, 128, 2, 8)
Q, LOG_F = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2)


def recorded() -> Any:
    with record_attention(MODEL) as layers:
        MODEL(tokens(1, 8))
    return list(layers)


LAYERS = recorded()
SEGMENTS = {"length": 8, "ranks": 1}
# Arguments that are right, of each documented function but those named below.
RIGHT: dict[str, dict[str, Any]] = {
    "FoxAttention": {"config": MODEL.config, "layer_idx": 0},
    "FoxDecoderLayer": {"config": MODEL.config, "layer_idx": 0},
    "FoxPagedCache": {"config": MODEL.config, "max_cache_len": 64},
    "forgetting_attention": {"q": LONG, "k": LONG, "v": LONG}
    | {"log_f": LONG[..., 0], "eps": 0.1, "rule": "paper", "sink_k": Q[0, 0], "sink_v": Q[0, 0]},
    "first_kept": {"q": Q, "k": Q, "log_f": LOG_F, "eps": 0.1, "rule": "tight"},
    "share_skipped": {"first": torch.tensor([[[0, 4]]]), "length": 8, "block_q": 4},
    "centered": {"k": Q},
    "DistillingTrainer": {"model": MODEL, "args": TrainingArguments(use_cpu=True, report_to="none"), "teacher": MODEL},
    "SkippedShareRamp": {"goal": 0.5, "steps": 10},
    "distance": {"logits": torch.zeros(1, 4, 8), "expected": torch.zeros(1, 4, 8)},
    "peft_targets": {"model": MODEL},
    "compile_kernels": {"config": MODEL.config, "arch": "sm_90"},
    "skipped_share": {"model": MODEL, "batch": {"input_ids": tokens(1, 8)}},
    "zigzag": SEGMENTS,
    "contiguous": SEGMENTS,
    "balance_heads": {"model": MODEL, "ranks": 1},
    "convert_to_folder": {"source": "none", "out": "out"},
    "graft": {"model": base("llama")},
    "graft_to_folder": {"source": "none", "out": "out"},
    "calibrate": {"model": MODEL, "rows": tokens(1, 256)},
    "write_model_card": {"folder": "none"},
    "check_folder": {"folder": "none"},
    "push_folder": {"folder": "none", "repo_id": "a/b"},
    "load_model": {"source": "none", "device": "cpu"},
    "documents": {"path": Path("none.txt"), "tokenizer": None},
    "rows": {"path": Path("none.txt"), "tokenizer": None, "length": 8, "count": 1},
    "record_attention": {"model": MODEL},
    "decay_times": {"log_f": LOG_F},
    "decay_time_table": {"layers": LAYERS},
    "skipped_shares": {"layers": LAYERS, "log_eps": [-10.0], "rule": "tight"},
    "attention_weights": {"layer": LAYERS[0], "head": 0},
    "attention_reach": {"layers": LAYERS},
    "loss_by_position": {"model": MODEL, "rows": tokens(1, 8)},
    "row_losses": {"model": MODEL, "rows": tokens(1, 8)},
    "by_interval": {"losses": torch.zeros(2, 7), "edges": [0, 4, 7]},
    "measure_losses": {},
    "measure_needle": {},
    "run_report": {},
    "evaluate": {"options": Options("none", Path("out")), "say": print},
    "prepare_fsdp2": {"accelerator": Accelerator(cpu=True), "model": MODEL},
    "shard_forget_gates": {"model": MODEL},
    "save_whole_model": {},
}
# Models take what transformers gives their configurations; the others are containers, or of several processes.
ELSEWHERE = {name for name in SECTIONS["Models"]["foxlm"] if name.startswith(("FoxFor", "FoxModel", "FoxPre"))}
ELSEWHERE |= {
    "FoxConfig",
    "FoxTrainer",
    "context_parallel_attention",
    "ContextParallel",
    "CommunicationVolume",
    "Segment",
}
ELSEWHERE |= {"FoxParallelismConfig", "Calibration", "CalibrationText", "AttentionInputs"}
ELSEWHERE |= {"LossOptions", "NeedleOptions", "Options"}
# Taken as true or false, or passed on to transformers.
UNTYPED = {"args", "kwargs", "progress", "overwrite", "join", "private", "allow_pickle", "train"}
UNTYPED |= {"return_lse", "return_kv_start", "return_first", "output_gate", "keep_rope"}


def documented() -> Iterator[tuple[str, Callable[..., Any]]]:
    for modules in SECTIONS.values():
        for module, names in modules.items():
            for name in names:
                if name not in ELSEWHERE:
                    yield name, getattr(importlib.import_module(module), name)


CASES = [
    (name, parameter)
    for name, function in documented()
    for parameter, found in inspect.signature(function).parameters.items()
    if parameter not in UNTYPED and found.kind is not found.VAR_KEYWORD
]


def used(result: Any) -> Any:
    """The result of a function that is called, and of its iterator or context, if it is one."""
    if hasattr(result, "__enter__"):
        return result.__enter__()
    return list(itertools.islice(result, 1)) if isinstance(result, Iterator) else result


class Thing:
    """Of no type that any argument takes."""


@pytest.mark.parametrize(("name", "parameter"), CASES, ids=lambda x: x)
def test_argument_of_a_wrong_type_is_named(name: str, parameter: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    function = dict(documented())[name]
    given = RIGHT[name] | {parameter: Thing()}
    with pytest.raises((TypeError, ValueError)) as error:
        used(function(**given))
    assert re.search(rf"\b{parameter}\b.* (must|expected) ", str(error.value)), error.value
    assert "Thing" in str(error.value), "what came"


def test_control_right_arguments_are_taken() -> None:
    for name in ("FoxAttention", "first_kept", "share_skipped", "distance", "zigzag", "decay_times", "by_interval"):
        used(dict(documented())[name](**RIGHT[name]))
