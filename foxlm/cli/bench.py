"""``foxlm bench``: the speed of attention, training and generation, measured on this machine."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foxlm.cli.errors import CommandLine, deprecated
from foxlm.cli.options import Join, Text

if TYPE_CHECKING:
    from foxlm.evaluation.benchmark.models import Workload
    from foxlm.evaluation.benchmark.runner import Report, Variant

app = CommandLine(
    # Each paragraph one line: the terminal wraps them.
    help="Measure the speed of forgetting attention, training and generation on this machine.\n\n"
    "The results of each variant are checked before it is timed, and a variant that fails the check has no time. Each "
    "row is shown on stderr and kept in the JSON file as soon as it is measured; an interrupted run keeps its rows. At "
    "the end a table is printed. Times are medians of two passes over all variants. Needs an NVIDIA GPU; --device cpu "
    "only shows that all parts work.\n\n"
    "A model of your own: foxlm bench generate --model my-fox --text book.txt",
)

Preset = Annotated[
    str | None,
    typer.Option(help="Sizes of a FoxConfig.preset, for a new model on random tokens; pro-760m if nothing is given."),
]
Layers = Annotated[int | None, typer.Option(help="Layers, if not the preset's.")]
HiddenSize = Annotated[int | None, typer.Option(help="Width of the residual stream, if not the preset's.")]
Heads = Annotated[int | None, typer.Option(help="Attention heads, if not the preset's.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="A FoX model of yours, a folder or a name on the Hugging Face Hub, measured with the gates that it has "
        "learned, instead of a preset; needs --text.",
    ),
]
Rounds = Annotated[int, typer.Option(help="Timed calls in each of two passes.")]
Only = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Part of a name in the table; may be repeated; all by default.")
]
Device = Annotated[str, typer.Option(help="cuda, or cpu for a smoke test on tiny sizes, whose timings mean nothing.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Commit = Annotated[str | None, typer.Option(help="The commit to record where foxlm does not run from a git checkout.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")]


@app.command()
def attention(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-attention.json"),
    case: Annotated[
        list[str] | None,
        typer.Option(help="BxHxDxT to measure: sequences, heads, their size, tokens; may be repeated."),
    ] = None,
    only: Only = None,
    long: Annotated[bool, typer.Option("--long", help="A million tokens too, with pruning.")] = False,
    model: Model = None,
    text: Text = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a row of --text; 16384, or 256 on a CPU.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of --text, 1 by default; all layers are one batch.")] = None,
    join: Join = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Rounds = 15,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """One attention layer, forward and backward, beside cuDNN, FlashAttention, FlexAttention and what else is there.

    The inputs are synthetic, with gates as those of trained models. With --model and --text they are what enters
    attention in every layer of a model of yours. Exits with 1 if foxlm's own attention is wrong or fails.
    """
    from foxlm.evaluation.benchmark.attention import measured
    from foxlm.evaluation.benchmark.attention.implementations import OURS, chosen
    from foxlm.evaluation.benchmark.attention.inputs import Case, record_inputs
    from foxlm.evaluation.benchmark.runner import run
    from foxlm.evaluation.loading import DTYPES

    _check(device, out, {"--rounds": [rounds]})
    _require_one_of("--dtype", dtype, list(DTYPES))
    implementations = chosen(only or [])
    shapes = [(Case.parse(one), implementations) for one in case or []]
    if model is None and text is None:
        if join or rows is not None or length is not None:
            raise ValueError("--length, --rows and --join require --model and --text, got them without")
        of_device = [measured.CPU_CASE] if device == "cpu" else measured.CASES
        shapes = shapes or [(one, implementations) for one in of_device]
        if long:
            pruned = [one for one in implementations if one in OURS and one.rule is not None]
            shapes.append((measured.LONG_CASE, pruned))
        facts: dict[str, Any] = {}
        cases = [partial(measured.synthetic, one, those, device, DTYPES[dtype], seed) for one, those in shapes]
    else:
        if shapes or long:
            raise ValueError("--case and --long are of synthetic inputs, got them with --model or --text")
        count, tokens = 1 if rows is None else rows, (256 if device == "cpu" else 16384) if length is None else length
        _require_positive({"--rows": [count], "--length": [tokens]})
        workload = _workload(device, seed, model=model, text=text, join=join)
        typer.echo("reading the text", err=True)
        recorded, inputs, facts = record_inputs(workload, count, tokens, DTYPES[dtype])
        cases = [partial(measured.variants, recorded, inputs, implementations, seed)]
    with _report("attention", out, device, seed, commit, as_json, {"dtype": dtype, "rounds": rounds} | facts) as report:
        for variants in cases:
            run(variants(), report, rounds, device)


@app.command()
def context(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-context.json"),
    gpus: Annotated[int, typer.Option(help="GPUs of this machine that share each sequence; 2 or more.")] = 2,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="BxHxDxT to measure: sequences, heads, their size, tokens of the whole sequence; may be repeated; "
            "1x24x64x131072, or 1x4x16x1024 on a CPU."
        ),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Pruning rule by which keys need not be sent: tight, paper, or none (all are sent).")
    ] = "tight",
    split: Annotated[
        str,
        typer.Option(help="Who gets which tokens: zigzag (two pieces each, from either end) or contiguous (one)."),
    ] = "zigzag",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Rounds = 7,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Attention by context parallelism: one sequence on several GPUs, beside the whole on one of them.

    Forward and backward, with the communication volume, and that of ring attention. The inputs are synthetic, with
    gates as those of trained models. Each case must fit on one GPU, for comparison. Exits with 1 if a result is not
    that of one GPU, or fails.
    """
    from foxlm.evaluation.benchmark.attention import context_parallel as measured
    from foxlm.evaluation.benchmark.attention.inputs import Case
    from foxlm.evaluation.gates import RULES
    from foxlm.evaluation.loading import DTYPES

    _check(device, out, {"--rounds": [rounds]})
    if gpus < 2:
        raise ValueError(f"--gpus must be 2 or more, which share a sequence, got {gpus}")
    _require_gpus(device, gpus)
    _require_one_of("--dtype", dtype, list(DTYPES))
    _require_one_of("--rule", rule, [*RULES, "none"])
    _require_one_of("--split", split, ["zigzag", "contiguous"])
    cases = tuple(map(Case.parse, case or ())) or (measured.CPU_CASES if device == "cpu" else measured.CASES)
    for one in cases:
        if one.tokens < gpus:
            raise ValueError(f"--case must have a token for each of {gpus} GPUs, got {one} with {one.tokens}")
    by_rule = next((one for one in RULES if one == rule), None)
    recipe = measured.ContextRecipe(cases, gpus, device, DTYPES[dtype], by_rule, split, rounds, seed)
    facts = {"dtype": dtype, "rounds": rounds, "gpus": gpus, "rule": rule, "split": split}
    facts |= {"calls_in_a_row": measured.IN_A_ROW} | ({} if by_rule else {"eps": 0.0})
    with _report("context", out, device, seed, commit, as_json, facts) as report:
        _run_ranks(measured.measure_on_rank, gpus, device, recipe, report, out)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-train.json"),
    preset: Preset = None,
    layers: Layers = None,
    hidden_size: HiddenSize = None,
    heads: Heads = None,
    model: Model = None,
    text: Text = None,
    join: Join = False,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", "--tokens", help="Tokens of the one sequence in a step, of each GPU; 16384, or 256 on a CPU."
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option(help="GPUs of this machine to train on with FSDP2, and on one of them to compare with.")
    ] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers in backward instead of keeping activations.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Steps with compiled layers and loss too.")] = False,
    only: Only = None,
    rounds: Rounds = 5,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """A training step of a whole model, with pruning and without; the weights stay as they are.

    The model is a preset with synthetic gates, or yours; --layers, --hidden-size and --heads change its shape. With
    --gpus N also on N GPUs, one sequence on each. Exits with 1 if a step is wrong or fails.
    """
    from foxlm import FoxConfig
    from foxlm.evaluation.benchmark import train as measured
    from foxlm.evaluation.benchmark.runner import failure, run
    from foxlm.evaluation.benchmark.timing import release_memory

    length = (256 if device == "cpu" else 16384) if length is None else length
    _check(device, out, {"--rounds": [rounds], "--gpus": [gpus], "--length": [length]})
    _require_gpus(device, gpus)
    workload = _workload(device, seed, preset, layers, model, text, join, hidden_size, heads)
    recipe = measured.Recipe(workload, length, compiled, checkpointing, tuple(only or ()))
    if workload.model is None:
        # Errors in sizes are found now, not after minutes.
        recipe.steps(FoxConfig.preset(workload.preset, **dict(workload.sizes)))
    facts = {"dtype": "float32 weights, bfloat16 matmuls", "rounds": rounds, "tokens": length, "gpus": gpus}
    facts |= {"checkpointing": checkpointing} | workload.facts()
    with _report("train", out, device, seed, commit, as_json, facts) as report:
        try:
            run(measured.variants(recipe), report, rounds, device)
        except RuntimeError as error:
            # A model that does not fit on one GPU may fit on several.
            if gpus == 1:
                raise
            report.new_row({"name": "all steps", "gpus": 1}).update(failure(error))
        release_memory(device)
        if gpus > 1:
            from foxlm.evaluation.benchmark.train_multi_gpu import measure_on_rank

            _run_ranks(measure_on_rank, gpus, device, (recipe, rounds), report, out)


@app.command("prefill", hidden=True)
@app.command("decode", hidden=True)
@app.command()
def generate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-generate.json"),
    preset: Preset = None,
    layers: Layers = None,
    model: Model = None,
    text: Text = None,
    join: Join = False,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            "--tokens",
            help="Tokens of contexts, prompts and the training step; may be repeated; 14336, 4096 and 16384, and "
            "16384, or 256 on a CPU.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", "--batch", help="Sequences; may be repeated; 1 and 8.")
    ] = None,
    new: Annotated[int | None, typer.Option(help="N: calls that generate N and 2N tokens are timed; 64.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a chunk of a prompt; 4096, or 64 on a CPU.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Rows that torch.compile takes a minute for, such as Llama's static."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute: fewer tokens and rounds, generation alone, nothing compiled.")
    ] = False,
    only: Only = None,
    rounds: Annotated[int | None, typer.Option(help="Timed rounds in each of two passes; 3, or 2 if quick.")] = None,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """The calls that people write: generate by each cache, prompts, new processes and a training step, beside a Llama.

    Of each call of generate the milliseconds a token, by calls of N and 2N tokens, and apart from it the seconds until
    the first token and those of compiling. The model is a preset with synthetic gates, or yours; the Llama has its
    sizes. --only takes a part ("decode", "prefill", "start", "train") or any other part of a name. Exits with 1 if a
    row of FoX is wrong or fails.
    """
    from foxlm.evaluation.benchmark import generation as measured
    from foxlm.evaluation.benchmark.public_calls import Sizes, chosen, groups, usable

    part = context.info_name if context.info_name in ("prefill", "decode") else None
    if part is not None:
        deprecated(f"foxlm bench {part}", f"foxlm bench generate --only {part}")
    on_cpu = device == "cpu"
    new = (measured.CPU_NEW if on_cpu else measured.QUICK_NEW if quick else measured.NEW) if new is None else new
    chunk = (measured.CPU_CHUNK if on_cpu else measured.CHUNK) if chunk is None else chunk
    rounds = (2 if quick else 3) if rounds is None else rounds
    positive = {"--length": length or [], "--batch-size": batch_size or [], "--new": [new], "--chunk": [chunk]}
    _check(device, out, positive | {"--rounds": [rounds]})
    sizes = Sizes(new, chunk, tuple(length or ()), tuple(batch_size or ()))
    if on_cpu and not only and compiled is None:
        compiled = False
    rows = chosen(only or [], quick=quick, compiled=compiled, part=part)
    workload = _workload(device, seed, preset, layers, model, text, join)
    models = measured.build_models(workload, [one for one in rows if isinstance(one, measured.Call)])
    rows = usable(models["foxlm"].config, rows)
    # Too short a text is found now, not after minutes.
    workload.ids(models["foxlm"].config.vocab_size, 1, max(one[2] for one in sizes.contexts(device)))
    facts = _model_facts(workload, models) | {"new": new, "chunk": chunk, "rounds": rounds}
    with _report("generate", out, device, seed, commit, as_json, facts) as report:
        for variants, passes in groups(rows, models, workload, sizes):
            _run_group(variants, report, rounds, device, passes)


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="JSON files that the other commands wrote, of any kind.")],
    case: Annotated[list[str] | None, typer.Option(help="BxHxDxT to show; may be repeated; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of the results, put together.")] = False,
) -> None:
    """Print the tables of results as Markdown."""
    from foxlm.evaluation.benchmark import results as written
    from foxlm.evaluation.benchmark.tables import render
    from foxlm.evaluation.results import reading

    with reading(*files):
        together = written.merged([written.read(path) for path in files])
        known = {row["case"] for results in together for row in results["rows"] if "case" in row}
        for one in case or ():
            _require_one_of("--case", one, sorted(known))
        for results in together:
            results["rows"] = [row for row in results["rows"] if not case or row.get("case", case[0]) in case]
        drawn = written.to_json(together) if as_json else "\n\n".join(map(render, together))
    typer.echo(drawn)


@contextlib.contextmanager
def _report(
    kind: str, out: Path, device: str, seed: int, commit: str | None, as_json: bool, settings: Mapping[str, Any]
) -> "Iterator[Report]":
    """Keep and show the rows of a benchmark while it runs, and print a table when it ends or is interrupted.

    Exits with 130 if it was interrupted, with 1 if a row of this library was not measured.
    """
    from foxlm.evaluation.benchmark.results import new_results, to_json
    from foxlm.evaluation.benchmark.runner import Report
    from foxlm.evaluation.benchmark.tables import render
    from foxlm.modeling.configuration_fox import DEFAULT_EPS

    results = new_results(kind, device, seed, commit, {"eps": DEFAULT_EPS, **settings})
    report = Report(results, out)
    # SIGTERM as Ctrl-C: what was measured is kept and printed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield report
    except KeyboardInterrupt:
        results["error"] = "interrupted"
    except Exception as error:
        results["error"] = str(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if results["rows"]:
            report.save()
            typer.echo(to_json(results) if as_json else render(results))
    if "error" in results:
        kept = f"; what was measured is in {out}" if results["rows"] else " before anything was measured"
        typer.echo(f"interrupted{kept}", err=True)
        raise typer.Exit(130)
    ours = [row for row in results["rows"] if row.get("family", "foxlm") == "foxlm" and not _is_baseline(row)]
    if any(row["status"] != "measured" for row in ours):
        raise typer.Exit(1)


def _run_group(variants: "Iterator[Variant]", report: "Report", rounds: int, device: str, passes: int) -> None:
    """Measure ``variants``; what is raised between them, such as for a model that does not fit, ends no other group."""
    from foxlm.evaluation.benchmark.runner import failure, run

    try:
        run(variants, report, rounds, device, passes=passes)
    except Exception as error:
        report.new_row({"name": "the rest of a group"}).update(failure(error))


def _is_baseline(row: Mapping[str, Any]) -> bool:
    from foxlm.evaluation.benchmark.attention.implementations import BASELINES

    return row["name"] in {one.name for one in BASELINES}


def _run_ranks(
    measure: Callable[..., None], ranks: int, device: str, recipe: object, report: "Report", out: Path
) -> None:
    """Measure in a process for each GPU; the rows that they leave in ``out`` are the report's."""
    from foxlm.evaluation.benchmark.ranks import run_ranks
    from foxlm.evaluation.benchmark.results import read

    report.save()
    try:
        run_ranks(measure, ranks, device, recipe, report.results, out)
    finally:
        report.results["rows"] = read(out)["rows"]


def _workload(
    device: str,
    seed: int,
    preset: str | None = None,
    layers: int | None = None,
    model: str | None = None,
    text: Path | None = None,
    join: bool = False,
    hidden_size: int | None = None,
    heads: int | None = None,
) -> "Workload":
    """What a command was told to measure.

    Raises:
        ValueError: options that contradict each other, or are not as they must be.
    """
    from foxlm.evaluation.benchmark.models import CPU_SIZES, PRESET, Workload

    given = {"--preset": preset, "--layers": layers, "--hidden-size": hidden_size, "--heads": heads}
    of_new = next((name for name, value in given.items() if value is not None), None)
    if model is not None and of_new is not None:
        raise ValueError(f"{of_new} is of new models, got it with --model {model}")
    if join and text is None:
        raise ValueError("--join is of --text, got it without")
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    _require_positive({name: [value] for name, value in given.items() if isinstance(value, int)})
    if model is not None or text is not None:
        return Workload(device, model=model, text=text, join=join, seed=seed)
    return Workload(
        device, preset or PRESET, tuple({**(CPU_SIZES if device == "cpu" else {}), **sizes}.items()), seed=seed
    )


def _model_facts(workload: "Workload", models: Mapping[str, Any]) -> dict[str, Any]:
    fox = models["foxlm"]
    parameters = sum(parameter.numel() for parameter in fox.parameters())
    return {"dtype": "bfloat16", "parameters": parameters, "layers": fox.config.num_hidden_layers} | workload.facts()


def _check(device: str, out: Path, positive: Mapping[str, Any]) -> None:
    """Raise a `ValueError` now rather than after the measurement for what cannot be."""
    import torch

    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA GPU; --device cpu shows that all parts work")
    if out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {out}")
    _require_positive(positive)
    out.parent.mkdir(parents=True, exist_ok=True)


def _require_positive(options: Mapping[str, Any]) -> None:
    for name, values in options.items():
        for value in values:
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")


def _require_one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


# Processes that are started at most where there are no GPUs to count.
_MOST_CPU_RANKS = 8


def _require_gpus(device: str, gpus: int) -> None:
    import torch

    there = _MOST_CPU_RANKS if device == "cpu" else torch.cuda.device_count()
    if gpus > there:
        of = f"{there} processes with --device cpu" if device == "cpu" else f"the {there} that torch sees"
        raise ValueError(f"--gpus must be at most {of}, got {gpus}")
