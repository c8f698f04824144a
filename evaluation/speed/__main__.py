"""Speed benchmarks: ``python -m foxlm.evaluation.speed attention``, ``train``, ``decode``; ``table`` shows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from . import decode as decoding
from . import report
from .attention import CASES, CPU_CASE, LONG_CASE, Settings, chosen, run_case
from .implementations import EPS, TILE, with_names
from .inputs import Case
from .models import CPU_SIZES, Sizes
from .own import OWN
from .runner import Record
from .sessions import DECODERS
from .train import CPU_TOKENS, TOKENS, Recipe, run_training

app = typer.Typer(
    help="Speed of forgetting attention, and of training and decoding with it. What a check finds wrong is not timed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Preset = Annotated[str, typer.Option(help="A FoxConfig.preset.")]
Layers = Annotated[int | None, typer.Option(help="Layers, if not the preset's.")]
Device = Annotated[str, typer.Option(help="cuda, or cpu to see that all parts work: tiny sizes, figures of no use.")]
Seed = Annotated[int, typer.Option(help="Of inputs, weights and what is checked.")]
Commit = Annotated[str | None, typer.Option(help="What is measured, where foxlm is in no checkout that could tell.")]


@app.command()
def attention(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-attention.json"),
    case: Annotated[list[str] | None, typer.Option(help="BxHxDxT to measure; may be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Part of an implementation's name; may be repeated.")] = None,
    long: Annotated[bool, typer.Option("--long", help="A million tokens too, with pruning.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Timed calls in each of two passes.")] = 15,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """One attention layer, forward and backward, beside others. Exits with 1 if foxlm's own is wrong or fails."""
    try:
        _require_device(device)
        _require_positive("--rounds", rounds)
        if dtype not in _DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        implementations = chosen(only or [])
        shapes = [Case.parse(text) for text in case or []] or ([CPU_CASE] if device == "cpu" else CASES)
        plan = [(shape, implementations) for shape in shapes]
        if long:
            plan.append((LONG_CASE, [one for one in implementations if one in OWN and one.rule is not None]))
        facts = {"dtype": dtype, "rounds": rounds, "eps": EPS, "tile": TILE}
        results = report.new_results("attention", device, seed, commit, facts) | {"cases": []}
    except ValueError as error:
        _fail(error)
    for shape, those in plan:
        typer.echo(f"measuring {shape}", err=True)
        results["cases"].append(run_case(shape, those, Settings(device, _DTYPES[dtype], rounds, seed)))
        # After each: what stops a long run leaves what was measured before.
        report.write(results, out)
    typer.echo(report.render(results))
    own = {one.name for one in OWN}
    records = [one for shape in results["cases"] for one in (*shape["implementations"], *shape["open_gates"])]
    _exit([one for one in records if one["name"] in own], complete=all("error" not in one for one in results["cases"]))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-train.json"),
    preset: Preset = "pro-760m",
    layers: Layers = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"Tokens of the one sequence in a step; {TOKENS}, or {CPU_TOKENS} on a CPU.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Steps with compiled layers and loss too.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed steps in each of two passes.")] = 5,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """A training step of a whole model, with pruning and without. Exits with 1 if a step is wrong or fails."""
    try:
        _require_device(device)
        _require_positive("--rounds", rounds)
        if tokens is None:
            tokens = CPU_TOKENS if device == "cpu" else TOKENS
        _require_positive("--tokens", tokens)
        recipe = Recipe(
            device=device,
            preset=preset,
            sizes=_sizes(device, layers),
            tokens=tokens,
            compiled=compiled,
            rounds=rounds,
            seed=seed,
        )
        facts = {"dtype": "float32 weights, bfloat16 autocast", "rounds": rounds, "eps": EPS, "tile": TILE}
        results = report.new_results("train", device, seed, commit, facts) | run_training(recipe)
    except (ValueError, RuntimeError) as error:
        _fail(error)
    report.write(results, out)
    typer.echo(report.render(results))
    _exit(results["steps"], complete=True)


@app.command()
def decode(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-decode.json"),
    preset: Preset = "pro-760m",
    layers: Layers = None,
    tokens: Annotated[
        int | None,
        typer.Option(help=f"Tokens before the first step; {decoding.TOKENS}, or {decoding.CPU_TOKENS} on a CPU."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; may be repeated; 1 and 8 by default.")] = None,
    new: Annotated[int, typer.Option(help="Steps in a timed round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed rounds in each of two passes.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Part of a name, as in the table; may be repeated.")] = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Find it, static and paged; nothing else unless --batch is given.")
    ] = False,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
) -> None:
    """A decoding step of a whole model, by cache and pruning, beside a Llama. Exits with 1 if one is wrong or fails."""
    try:
        _require_device(device)
        if tokens is None:
            tokens = decoding.CPU_TOKENS if device == "cpu" else decoding.TOKENS
        for name, value in (("--tokens", tokens), ("--new", new), ("--rounds", rounds)):
            _require_positive(name, value)
        batches = batch or (() if largest_batch else decoding.BATCHES)
        for size in batches:
            _require_positive("--batch", size)
        decoders = with_names(DECODERS, only or [])
        recipe = decoding.DecodeRecipe(
            device=device,
            preset=preset,
            sizes=_sizes(device, layers),
            tokens=tokens,
            new=new,
            rounds=rounds,
            seed=seed,
        )
        models = decoding.build_models(recipe, decoders if batches else [])
        fox = models["foxlm"]
        facts = {"dtype": "bfloat16", "rounds": rounds, "eps": EPS, "preset": preset, "tokens": tokens, "new": new}
        facts |= {"layers": fox.config.num_hidden_layers, "parameters": sum(x.numel() for x in fox.parameters())}
        results = report.new_results("decode", device, seed, commit, facts) | {"batches": [], "largest_batch": []}
    except (ValueError, RuntimeError) as error:
        _fail(error)
    for size in batches:
        typer.echo(f"measuring batch {size}", err=True)
        results["batches"].append(decoding.run_batch(size, models, decoders, recipe))
        # After each: what stops a long run leaves what was measured before.
        report.write(results, out)
    if largest_batch:
        results["largest_batch"].append(decoding.run_largest_batch(models, recipe))
        report.write(results, out)
    typer.echo(report.render(results))
    records = [one for of_batch in results["batches"] for one in of_batch["decoders"] if one["family"] == "foxlm"]
    records += [one[cache] for one in results["largest_batch"] for cache in ("static", "paged")]
    present = [one for one in records if one["status"] != "missing"]
    _exit(present, complete=all("error" not in one for one in results["batches"]))


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="JSON files that the others wrote, cases in any number.")],
    case: Annotated[list[str] | None, typer.Option(help="BxHxDxT to show; may be repeated; all by default.")] = None,
    readme: Annotated[
        Path | None, typer.Option(help="File to put the tables into, between <!-- speed:KIND --> markers.")
    ] = None,
) -> None:
    """Print the tables of results as Markdown, or put them into a file."""
    try:
        for results in report.merged([report.read(path) for path in files]):
            tables = report.render(report.only_cases(results, case or []))
            if readme is None:
                typer.echo(tables)
            else:
                text = readme.read_text(encoding="utf-8")
                readme.write_text(report.insert(text, results["kind"], tables), encoding="utf-8")
    except (ValueError, OSError) as error:
        _fail(error)


def _require_device(device: str) -> None:
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA GPU; --device cpu shows that all parts work")


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")


def _sizes(device: str, layers: int | None) -> Sizes:
    """What differs from a preset: all of it on a CPU."""
    sizes = dict(CPU_SIZES) if device == "cpu" else {}
    if layers is not None:
        _require_positive("--layers", layers)
        sizes["num_hidden_layers"] = layers
    return tuple(sizes.items())


def _exit(records: Sequence[Record], complete: bool) -> None:
    if not complete or any(one["status"] != "measured" for one in records):
        raise typer.Exit(1)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m foxlm.evaluation.speed")
