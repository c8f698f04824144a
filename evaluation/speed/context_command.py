"""The command `foxlm bench context`: its options, and what they must be."""

from pathlib import Path
from typing import Annotated

import typer

from foxlm.evaluation.loading import DTYPES
from foxlm.kernels.context_parallel.partition import NAMED_SPLITS
from foxlm.kernels.pruning.rules import Rule

from . import options, report
from .context import CASES, CPU_CASES, IN_A_ROW, ContextRecipe, run_context
from .implementations import EPS, RULES, TILE
from .inputs import Case


def context(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-context.json"),
    gpus: Annotated[int, typer.Option(help="GPUs of this machine that share each sequence; 2 or more.")] = 2,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="BxHxDxT to measure: sequences, heads, their size, tokens of the whole sequence; may be repeated; "
            f"{CASES[0]}, or {CPU_CASES[0]} on a CPU."
        ),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Of pruning, by which keys need not be fetched: tight or paper; none moves all.")
    ] = "tight",
    split: Annotated[
        str,
        typer.Option(help="Who gets which tokens: balanced (two pieces each, from either end) or contiguous (one)."),
    ] = "balanced",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: options.Rounds = 7,
    device: options.Device = "cuda",
    seed: options.Seed = 0,
    commit: options.Commit = None,
    as_json: options.AsJson = False,
) -> None:
    """Attention by context parallelism: one sequence on several GPUs, beside the whole on one of them.

    Forward and backward, with the bytes of keys and values that are moved, and those that ring attention would move.
    The inputs are synthetic, with gates as those of trained models. Each case must fit on one GPU, for comparison.
    Exits with 1 if a result is not that of one GPU, or fails.
    """
    options.require_device(device)
    options.require_positive("--rounds", rounds)
    if gpus < 2:
        raise ValueError(f"--gpus must be 2 or more, which share a sequence, got {gpus}")
    options.require_gpus(device, gpus)
    options.require_writable(out)
    for name, value, known in (
        ("--dtype", dtype, DTYPES),
        ("--rule", rule, (*RULES, "none")),
        ("--split", split, NAMED_SPLITS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    cases = [_shared_case(one, gpus) for one in case or ()] or (CPU_CASES if device == "cpu" else CASES)
    by_rule: Rule | None = next((one for one in RULES if one == rule), None)
    recipe = ContextRecipe(cases, gpus, device, DTYPES[dtype], by_rule, split, rounds, seed)
    facts = {"dtype": dtype, "rounds": rounds, "eps": 0.0 if by_rule is None else EPS, "tile": TILE}
    facts |= {"gpus": gpus, "rule": rule, "split": split, "calls_in_a_row": IN_A_ROW}
    results = report.new_results("context", device, seed, commit, facts)
    results |= run_context(recipe)
    report.write(results, out)
    options.show(results, as_json)
    if "error" in results:
        typer.echo(f"error: {results['error']}\n{results['detail']}".rstrip(), err=True)
    options.finish(results["cases"], complete="error" not in results)


def _shared_case(text: str, gpus: int) -> Case:
    case = Case.parse(text)
    if case.tokens < gpus:
        raise ValueError(f"--case must have a token for each of {gpus} GPUs, got {text!r} with {case.tokens}")
    return case
