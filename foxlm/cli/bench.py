"""``foxlm bench``: the speed of attention, training, prefill and decoding, measured on this machine."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foxlm.cli.errors import PASS_THROUGH, CommandLine

if TYPE_CHECKING:
    from foxlm.evaluation.speed.attention import Settings
    from foxlm.evaluation.speed.decode import Models
    from foxlm.evaluation.speed.recorded import Recorded
    from foxlm.evaluation.speed.workload import Workload

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
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='What that model reads: a UTF-8 file, .jsonl with a "text" in each line, .npy token numbers, or a folder '
        "of such files.",
    ),
]
Join = Annotated[bool, typer.Option("--join", help="Put documents that are too short one after the other.")]
Rounds = Annotated[int, typer.Option(help="How often each is timed, in each of two passes.")]
Only = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Part of a name in the table; may be repeated; all by default.")
]
Device = Annotated[str, typer.Option(help="cuda, or cpu to see that all parts work: tiny sizes, figures of no use.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn at random.")]
Commit = Annotated[
    str | None, typer.Option(help="The commit that is measured, where foxlm lies in no checkout that could tell.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")]

app = CommandLine(
    # Each paragraph one line: the terminal wraps them.
    help="How fast forgetting attention is on this machine, and training, prompts and decoding with it.\n\n"
    "Each command first checks that what it is about to time computes the right thing, and prints no time of what does "
    "not. It writes its results as JSON and prints them as a table. What is compared takes turns, so that heat and "
    "clocks fall on all alike; times are medians. Needs an NVIDIA GPU; with --device cpu it only shows that all parts "
    "work.\n\n"
    "A model of your own: foxlm bench prefill --model my-fox --text book.txt",
)


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

    The inputs are synthetic, with gates as those of trained models.
    With --model and --text they are what enters attention in every layer of a model of yours.
    Exits with 1 if foxlm's own attention is wrong or fails.
    """
    from foxlm.evaluation.loading import DTYPES
    from foxlm.evaluation.speed import options, report
    from foxlm.evaluation.speed.attention import CASES, CPU_CASE, LONG_CASE, Settings, chosen, run_case, run_recorded
    from foxlm.evaluation.speed.implementations import EPS, TILE
    from foxlm.evaluation.speed.inputs import Case
    from foxlm.evaluation.speed.own import OWN

    options.require_device(device)
    options.require_positive("--rounds", rounds)
    options.require_writable(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    implementations = chosen(only or [])
    settings = Settings(device, DTYPES[dtype], rounds, seed)
    facts = {"dtype": dtype, "rounds": rounds, "eps": EPS, "tile": TILE}
    results = report.new_results("attention", device, seed, commit, facts) | {"cases": []}
    recorded = _recorded(settings, model, text, join, rows, length, synthetic=bool(case or long))
    shapes = [Case.parse(one) for one in case or []] or ([CPU_CASE] if device == "cpu" else CASES)
    plan = [(shape, implementations) for shape in shapes]
    if long:
        plan.append((LONG_CASE, [one for one in implementations if one in OWN and one.rule is not None]))
    for shape, those in plan if recorded is None else [(recorded.case, implementations)]:
        typer.echo(f"measuring {shape}", err=True)
        found = run_case(shape, those, settings) if recorded is None else run_recorded(recorded, those, settings)
        results["cases"].append(found)
        # After each: what stops a long run leaves what was measured before.
        report.write(results, out)
    options.show(results, as_json)
    own = {one.name for one in OWN}
    records = [one for shape in results["cases"] for one in (*shape["implementations"], *shape["open_gates"])]
    complete = all("error" not in one for one in results["cases"])
    options.finish([one for one in records if one["name"] in own], complete)


def _recorded(
    settings: "Settings",
    model: str | None,
    text: Path | None,
    join: bool,
    rows: int | None,
    length: int | None,
    synthetic: bool,
) -> "Recorded | None":
    """The inputs of a model that reads text; None where neither is given."""
    from foxlm.evaluation.speed import options
    from foxlm.evaluation.speed.recorded import record_inputs
    from foxlm.evaluation.speed.train import CPU_TOKENS, TOKENS

    if model is None and text is None:
        if join or rows is not None or length is not None:
            raise ValueError("--length, --rows and --join are of --model and --text, got them without")
        return None
    if synthetic:
        raise ValueError("--case and --long are of synthetic inputs, got them with --model or --text")
    rows = 1 if rows is None else rows
    length = (CPU_TOKENS if settings.device == "cpu" else TOKENS) if length is None else length
    options.require_positive("--rows", rows)
    options.require_positive("--length", length)
    workload = options.workload(settings.device, settings.seed, None, None, model, text, join)
    typer.echo("reading the text", err=True)
    return record_inputs(workload, rows, length, settings.dtype)


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
        str, typer.Option(help="Of pruning, by which keys need not be fetched: tight or paper; none moves all.")
    ] = "tight",
    split: Annotated[
        str,
        typer.Option(help="Who gets which tokens: balanced (two pieces each, from either end) or contiguous (one)."),
    ] = "balanced",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Rounds = 7,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Attention by context parallelism: one sequence on several GPUs, beside the whole on one of them.

    Forward and backward, with the bytes of keys and values that are moved, and those that ring attention would move.
    The inputs are synthetic, with gates as those of trained models. Each case must fit on one GPU, for comparison.
    Exits with 1 if a result is not that of one GPU, or fails.
    """
    from foxlm.evaluation.loading import DTYPES
    from foxlm.evaluation.speed import options, report
    from foxlm.evaluation.speed.context import CASES, CPU_CASES, IN_A_ROW, ContextRecipe, run_context
    from foxlm.evaluation.speed.implementations import EPS, RULES, TILE
    from foxlm.kernels.context_parallel.partition import NAMED_SPLITS

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
    cases = [options.shared_case(one, gpus) for one in case or ()] or (CPU_CASES if device == "cpu" else CASES)
    by_rule = next((one for one in RULES if one == rule), None)
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
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the one sequence in a step, of each GPU; 16384, or 256 on a CPU."),
    ] = None,
    gpus: Annotated[
        int, typer.Option(help="GPUs of this machine to train on with FSDP2, and on one of them to compare with.")
    ] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute layers again in backward instead of keeping all (memory).")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Steps with compiled layers and loss too.")] = False,
    only: Only = None,
    host_gpus: Annotated[int, typer.Option(help="GPUs of a host, in what --gpus predicts for more of them.")] = 8,
    host_bandwidth: Annotated[
        float, typer.Option(help="GB/s into a host from the others, in the same; 8 x 400 Gbit/s by default.")
    ] = 400.0,
    rounds: Rounds = 5,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """A training step of a whole model, with pruning and without; the weights stay as they are.

    The model is a preset with synthetic gates, or yours; --layers, --hidden-size and --heads make it another's shape.
    With --gpus N also on N GPUs, one sequence on each, with what that says of 8 and 64.
    Exits with 1 if a step is wrong or fails.
    """
    from foxlm import FoxConfig
    from foxlm.evaluation.speed import options, report
    from foxlm.evaluation.speed.implementations import EPS, TILE
    from foxlm.evaluation.speed.several import run_several
    from foxlm.evaluation.speed.train import CPU_TOKENS, TOKENS, Recipe, run_training

    options.require_device(device)
    options.require_positive("--rounds", rounds)
    options.require_positive("--gpus", gpus)
    options.require_writable(out)
    if tokens is None:
        tokens = CPU_TOKENS if device == "cpu" else TOKENS
    options.require_positive("--tokens", tokens)
    workload = options.workload(device, seed, preset, layers, model, text, join, hidden_size, heads)
    recipe = Recipe(workload, tokens, compiled, rounds, checkpointing, tuple(only or ()))
    several = options.several(recipe, gpus, host_gpus, host_bandwidth) if gpus > 1 else None
    if workload.model is None:
        # Found out now, not after minutes.
        recipe.variants(FoxConfig.preset(workload.preset, **dict(workload.sizes)))
    dtype = "float32 weights, bfloat16 " + ("autocast" if several is None else "computing")
    facts = {"dtype": dtype, "rounds": rounds, "eps": EPS, "tile": TILE}
    results = report.new_results("train", device, seed, commit, facts)
    results |= run_training(recipe) if several is None else run_several(several)
    report.write(results, out)
    options.show(results, as_json)
    if "error" in results:
        typer.echo(f"error: {results['error']}\n{results['detail']}".rstrip(), err=True)
    options.finish(results["steps"], complete="error" not in results)


@app.command("prefill")
def prefill_command(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-prefill.json"),
    preset: Preset = None,
    layers: Layers = None,
    model: Model = None,
    text: Text = None,
    join: Join = False,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of each prompt; may be repeated; 4096 and 16384, or 256 on a CPU.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts; may be repeated; 1 and 8, or 1 on a CPU.")] = None,
    chunk: Annotated[
        int | None,
        typer.Option(help="Tokens of a part, where a prompt is taken in by parts; 4096, or 64 on a CPU."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compiled models too, which takes minutes.")] = False,
    rounds: Rounds = 3,
    only: Only = None,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """The time until the first token is there, and prompt tokens per second, of a whole model beside a plain Llama.

    By length and number of prompts, by pruning, whole or in parts.
    The model is a preset with synthetic gates, or yours; the Llama has its sizes.
    Exits with 1 if one is wrong or fails.
    """
    from foxlm.evaluation.speed import decode as decoding
    from foxlm.evaluation.speed import options, prefill, report
    from foxlm.evaluation.speed.implementations import with_names

    on_cpu = device == "cpu"
    options.require_device(device)
    options.require_writable(out)
    lengths = tokens or (prefill.CPU_TOKENS if on_cpu else prefill.TOKENS)
    batches = batch or (prefill.CPU_BATCHES if on_cpu else prefill.BATCHES)
    chunk = (prefill.CPU_CHUNK if on_cpu else prefill.CHUNK) if chunk is None else chunk
    for name, values in (("--tokens", lengths), ("--batch", batches), ("--chunk", [chunk]), ("--rounds", [rounds])):
        options.require_positive(name, *values)
    known = (*prefill.PREFILLERS, *(prefill.COMPILED if compiled else ()))
    ways = with_names(known, only or [])
    workload = options.workload(device, seed, preset, layers, model, text, join)
    models = decoding.build_models(workload, [one.decoder.family for one in ways])
    ways = prefill.prefillers_for(models["foxlm"], ways)
    facts = _model_facts(workload, models) | {"chunk": chunk, "rounds": rounds}
    results = report.new_results("prefill", device, seed, commit, facts) | {"prompts": []}
    recipe = prefill.PrefillRecipe(workload, chunk, rounds)
    for length in lengths:
        # Found out now, not after the others.
        workload.ids(models["foxlm"].config.vocab_size, 1, length)
    for length, size in itertools.product(lengths, batches):
        typer.echo(f"measuring {size} x {length}", err=True)
        results["prompts"].append(prefill.run_prompts(size, length, models, ways, recipe))
        report.write(results, out)
    options.show(results, as_json)
    records = [one for prompts in results["prompts"] for one in prompts["ways"] if one["family"] == "foxlm"]
    options.finish(records, complete=all("error" not in one for one in results["prompts"]))


@app.command()
def decode(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("speed-decode.json"),
    preset: Preset = None,
    layers: Layers = None,
    model: Model = None,
    text: Text = None,
    join: Join = False,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens before the first step; 14336, or 256 on a CPU."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; may be repeated; 1 and 8 by default.")] = None,
    new: Annotated[int, typer.Option(help="Steps in a timed round.")] = 32,
    rounds: Rounds = 3,
    only: Only = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Find it, static and paged; nothing else unless --batch is given.")
    ] = False,
    device: Device = "cuda",
    seed: Seed = 0,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """The time of one more token after a long context, by cache and pruning, beside a plain Llama.

    The model is a preset with synthetic gates, or yours; the Llama has its sizes.
    Exits with 1 if one is wrong or fails.
    """
    from foxlm.evaluation.speed import decode as decoding
    from foxlm.evaluation.speed import options, report
    from foxlm.evaluation.speed.implementations import with_names
    from foxlm.evaluation.speed.largest_batch import run_largest_batch
    from foxlm.evaluation.speed.sessions import DECODERS

    options.require_device(device)
    options.require_writable(out)
    if tokens is None:
        tokens = decoding.CPU_TOKENS if device == "cpu" else decoding.TOKENS
    batches = batch or (() if largest_batch else decoding.BATCHES)
    for name, values in (("--tokens", [tokens]), ("--new", [new]), ("--rounds", [rounds]), ("--batch", batches)):
        options.require_positive(name, *values)
    decoders = with_names(DECODERS, only or [])
    workload = options.workload(device, seed, preset, layers, model, text, join)
    models = decoding.build_models(workload, [one.family for one in decoders] if batches else [])
    fox = models["foxlm"]
    decoders = decoding.decoders_for(fox, decoders)
    if largest_batch and fox.config.forget_gate == "none":
        raise ValueError("--largest-batch compares what pruning frees, got a model without forget gates")
    recipe = decoding.DecodeRecipe(workload, tokens, new, rounds)
    workload.ids(fox.config.vocab_size, 1, recipe.read)
    facts = _model_facts(workload, models) | {"tokens": tokens, "new": new, "rounds": rounds}
    results = report.new_results("decode", device, seed, commit, facts) | {"batches": [], "largest_batch": []}
    for size in batches:
        typer.echo(f"measuring batch {size}", err=True)
        results["batches"].append(decoding.run_batch(size, models, decoders, recipe))
        report.write(results, out)
    if largest_batch:
        results["largest_batch"].append(run_largest_batch(models, recipe))
        report.write(results, out)
    options.show(results, as_json)
    records = [one for of_batch in results["batches"] for one in of_batch["decoders"] if one["family"] == "foxlm"]
    records += [one[cache] for one in results["largest_batch"] for cache in ("static", "paged")]
    options.finish(records, complete=all("error" not in one for one in results["batches"]))


def _model_facts(workload: "Workload", models: "Models") -> dict[str, Any]:
    """What results say of the model."""
    from foxlm.evaluation.speed.implementations import EPS

    fox = models["foxlm"]
    facts = {"dtype": "bfloat16", "eps": EPS} | workload.facts()
    return facts | {
        "layers": fox.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in fox.parameters()),
    }


_Files = Annotated[list[Path], typer.Argument(help="JSON files that the others wrote, of any kind.")]


@app.command()
def table(
    files: _Files,
    case: Annotated[list[str] | None, typer.Option(help="BxHxDxT to show; may be repeated; all by default.")] = None,
    readme: Annotated[
        Path | None, typer.Option(help="File to put the tables into, between <!-- speed:KIND --> markers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of the results, put together.")] = False,
) -> None:
    """Print the tables of results as Markdown, or put them into a file."""
    from foxlm.evaluation.results import reading
    from foxlm.evaluation.speed import report, tables

    several = [report.read(path) for path in files]
    with reading(*files):
        together = [report.only_cases(results, case or []) for results in report.merged(several)]
        all_drawn = [] if as_json else [(results["kind"], tables.render(results)) for results in together]
    if as_json:
        typer.echo(report.to_json(together))
    for kind, drawn in all_drawn:
        if readme is None:
            typer.echo(drawn)
        else:
            content = readme.read_text(encoding="utf-8")
            readme.write_text(report.insert(content, kind, drawn), encoding="utf-8")


@app.command("plan", hidden=True, context_settings=PASS_THROUGH)
def plan(context: typer.Context) -> None:
    """Removed: predictions for more GPUs."""
    raise ValueError("foxlm bench plan was removed; docs/several_gpus.md has the formula that it evaluated")


@app.command("plot", hidden=True, context_settings=PASS_THROUGH)
def plot(context: typer.Context) -> None:
    """Removed: a roofline of results."""
    raise ValueError("foxlm bench plot was removed; foxlm bench table prints what it drew")
