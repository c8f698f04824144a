"""Write docs/api.md, the reference of foxlm's public names, from their docstrings: ``python docs/make_api.py``."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
# Sections of the page: module and names, in the order of the reader's path.
SECTIONS = {
    "Models": {
        "foxlm": [
            "FoxConfig",
            "FoxModel",
            "FoxForCausalLM",
            "FoxForSequenceClassification",
            "FoxForTokenClassification",
            "FoxForQuestionAnswering",
            "FoxAttention",
            "FoxDecoderLayer",
            "FoxPagedCache",
            "FoxPreTrainedModel",
        ],
    },
    "Attention and pruning": {
        "foxlm": ["forgetting_attention"],
        "foxlm.kernels.pruning": ["first_kept", "share_skipped", "centered"],
    },
    "Training": {
        "foxlm.training": ["FoxTrainer", "DistillingTrainer", "SkippedShareRamp", "distance"],
        "foxlm": ["peft_targets"],
        "foxlm.warmup": ["compile_kernels"],
        "foxlm.evaluation.skipped_share": ["skipped_share"],
    },
    "Several GPUs": {
        "foxlm": ["ContextParallel", "context_parallel_attention"],
        "foxlm.kernels.context_parallel": ["CommunicationVolume", "Segment", "zigzag", "contiguous"],
        "foxlm.modeling.parallel.fsdp": [
            "prepare_fsdp2",
            "shard_forget_gates",
            "save_whole_model",
            "FoxParallelismConfig",
        ],
        "foxlm.conversion.balance_heads": ["balance_heads"],
    },
    "Conversion, grafting and publishing": {
        "foxlm.conversion.convert": ["convert_to_folder"],
        "foxlm.conversion.graft": ["graft", "graft_to_folder"],
        "foxlm.conversion.calibration": ["calibrate", "Calibration"],
        "foxlm.conversion.calibrated_graft": ["CalibrationText"],
        "foxlm.conversion.hub.model_card": ["write_model_card"],
        "foxlm.conversion.hub.publish": ["check_folder", "push_folder"],
    },
    "Evaluation": {
        "foxlm.evaluation.loading": ["load_model"],
        "foxlm.evaluation.text": ["documents", "rows"],
        "foxlm.evaluation.recording": ["record_attention", "AttentionInputs"],
        "foxlm.evaluation.gates": [
            "decay_times",
            "decay_time_table",
            "skipped_shares",
            "attention_weights",
            "attention_reach",
        ],
        "foxlm.evaluation.loss_by_position": ["loss_by_position", "row_losses", "by_interval"],
        "foxlm.evaluation.loss_report": ["LossOptions", "measure_losses"],
        "foxlm.evaluation.needle": ["NeedleOptions", "measure_needle"],
        "foxlm.evaluation.pruning_report.run": ["Options", "run_report"],
        "foxlm.evaluation.lm_eval.options": ["Options"],
        "foxlm.evaluation.lm_eval.run": ["evaluate"],
    },
}
_INTRODUCTION = (
    "# API reference\n\n"
    "The public names and their docstrings, as `python docs/make_api.py` writes them. Models have transformers' own\n"
    "methods (`from_pretrained`, `generate`, `save_pretrained`, ...) besides.\n"
)
_HEADINGS = ("Args", "Returns", "Yields", "Raises", "Example", "Attributes")


def render() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}\n")
        for module, names in modules.items():
            parts += [_entry(module, name, getattr(importlib.import_module(module), name)) for name in names]
    return "\n".join(parts)


def _entry(module: str, name: str, described: Any) -> str:
    lines = [f"### `{module}.{name}`\n"]
    if inspect.isfunction(described) or (dataclasses.is_dataclass(described) and name.endswith("Options")):
        lines.append(f"```text\n{_signature(name, described)}\n```\n")
    lines.append(as_markdown(inspect.getdoc(described) or ""))
    if inspect.isclass(described):
        for method, function in vars(described).items():
            own = inspect.isfunction(function) or isinstance(function, classmethod | property)
            # What is said here, not what transformers says of the method that is overridden.
            if own and function.__doc__ and not method.startswith(("_", "validate")):
                lines.append(f"#### `{name}.{method}`\n\n{as_markdown(inspect.cleandoc(function.__doc__))}")
    return "\n".join(lines)


def _signature(name: str, function: Any) -> str:
    """One parameter a line where the whole does not fit in one."""
    signature = inspect.signature(function)
    text = name + str(signature)
    if len(text) <= 100:
        return text
    lines: list[str] = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        lines.append(f"    {parameter},")
    # A signature without its parameters: "() -> what it returns".
    return "\n".join([f"{name}(", *lines, str(signature.replace(parameters=[])).removeprefix("(")])


def as_markdown(docstring: str) -> str:
    """A docstring of this project, whose sections are Google's, as Markdown."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        bare = line.strip()
        if bare.rstrip(":") in _HEADINGS and bare.endswith(":") and not line.startswith(" "):
            section = bare[:-1]
            lines += [f"**{section}**", ""]
        elif not section:
            lines.append(line)
        elif section == "Example":
            lines.append(line.removeprefix("    "))
        elif line.startswith("    ") and not line.startswith("     ") and re.match(r"[\w`*\[][^:]*:( |$)", bare):
            names, rest = bare.split(":", 1)
            lines.append(f"- {_as_code(names)}:{rest}")
        else:
            lines.append(("  " if bare and lines[-1].startswith(("- ", "  ")) else "") + bare)
    # Two backticks, not the three of a fence.
    return re.sub(r"(?<!`)``(?!`)", "`", _fence_examples("\n".join(lines))) + "\n"


def _as_code(names: str) -> str:
    """``a, b`` as code; what is marked already stays."""
    return names if "`" in names else ", ".join(f"`{name.strip()}`" for name in names.split(","))


def _fence_examples(text: str) -> str:
    """Prompts that are not in a fence get one."""
    fenced, inside, out = False, False, []
    for line in text.splitlines():
        prompt = line.strip().startswith((">>>", "..."))
        if line.strip().startswith("```"):
            fenced = not fenced
        if prompt and not fenced and not inside:
            out.append("```python")
            inside = True
        elif inside and not line.strip():
            out.append("```")
            inside = False
        out.append(line)
    return "\n".join([*out, "```"] if inside else out)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
