"""Train Forgetting Transformers and Transformers of the same sizes on the same text, and compare them.

    python examples/compare.py all --text books.jsonl --text code.jsonl --out runs

does these, each of which can be called alone, and skips what it finds done:

    python examples/compare.py prepare --text books.jsonl --text code.jsonl --out runs    # tokenizer and rows of tokens
    python examples/compare.py train --arm fox-pro --out runs              # one model; several on as many GPUs at once
    python examples/compare.py evaluate --out runs                         # loss by position, needle, pruning report

The arms are the four models of the Forgetting Transformer's paper: its two blocks, `pro` and `llama`, each with forget
gates (`fox-`) and with rotary embeddings in their place (`transformer-`). All else is the same: code, sizes, text, its
order, steps and recipe, which is the authors' (AdamW at 2e-3). Options of `train` change one thing of a run, which
`--name` then tells from the others:

    python examples/compare.py train --arm fox-pro --name from-half --decay-times 1.4427 1.4427 --out runs
"""

import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.evaluation.demo.optimizer import MuonAndAdamW
from foxlm.evaluation.provenance import provenance
from foxlm.modeling.layers.forget_gate import FoxForgetGate, bias_for_times
from foxlm.training import FoxTrainer

ARMS = ("fox-pro", "transformer-pro", "fox-llama", "transformer-llama")
OPTIMIZERS = ("adamw", "muon")
SIZES = ("45m", "125m", "360m", "760m")
# Beside the sizes of the papers: one that sees 20 tokens for each of its parameters within an hour of one H100.
SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
# What position costs a Transformer: rotary embeddings with the base that the FoX paper gives its baselines.
ROTARY = {"rope_type": "default", "rope_theta": 500_000.0}
WEIGHT_DECAY, MUON_RATE = 0.1, 6e-3
# Options of `train` that only models with gates have, and their defaults.
OF_GATES = {"decay_times": None, "unforgetting": 0.0, "gate_rate": 1.0, "gate_decay": WEIGHT_DECAY, "rope": False}
# Held-out rows are so many times as long as those trained on.
LONGER = 4
END_OF_TEXT = "<|endoftext|>"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder of the whole comparison.")]
Text = Annotated[
    list[Path],
    typer.Option(
        exists=True,
        dir_okay=False,
        help='A kind of text: .jsonl with a "text" in each line, or .txt. Repeatable. Neighboring lines whose "source" '
        "has the same folder are joined until they are as long as a held-out row.",
    ),
]
Vocabulary = Annotated[int, typer.Option(min=257, help="Of the tokenizer trained on the text.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of a tokenizer to take instead.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a training row, which lies within one document.")]
Tokens = Annotated[int, typer.Option(min=1, help="Training tokens of each kind at most, which balances the kinds.")]
HeldOut = Annotated[int, typer.Option(min=1, help="Documents of each kind that are held out.")]
Size = Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}: 43 million parameters, or as in the paper.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Fewer layers than that, for a trial.")]
Batch = Annotated[int, typer.Option(help="Tokens in a step, a multiple of the rows' length.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps; one pass over the text if not given.")]
Seed = Annotated[int, typer.Option(help="Of weights and order.")]


@app.command()
def prepare(
    text: Text,
    out: Out = Path("runs"),
    vocabulary: Vocabulary = 16384,
    tokenizer: Tokenizer = None,
    length: Length = 16384,
    tokens: Tokens = 20_000_000,
    held_out: HeldOut = 8,
) -> None:
    """Make the tokenizer, the training rows, and held-out documents and rows of each kind."""
    settings: dict[str, Any] = {"vocabulary": vocabulary, "length": length, "tokens": tokens, "held_out": held_out}
    settings |= {"text": sorted(file.name for file in text), "tokenizer": tokenizer and str(tokenizer)}
    if (out / "rows.npy").exists():
        made_with = json.loads((out / "text.json").read_text())["settings"]
        if made_with != settings:
            raise typer.BadParameter(f"{out} was prepared with {made_with}, now it is {settings}: take another --out")
        return
    names = [file.stem for file in text]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"--text must have a name of its own for each kind, got {', '.join(names)}")
    (out / "held_out").mkdir(parents=True, exist_ok=True)
    # A token has fewer than five characters in almost any text, so that what is joined is long enough.
    kinds = {file.stem: list(read_documents(file, 5 * LONGER * length)) for file in text}
    for documents in kinds.values():
        # An order that has nothing to do with what the text says, and that stays whatever else is added.
        documents.sort(key=lambda document: zlib.crc32(document.encode()))
    # From the other end than what is held out.
    some = [document for documents in kinds.values() for document in first_characters(documents[::-1], 20_000_000)]
    made = train_tokenizer(some, vocabulary) if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    made.save_pretrained(out / "tokenizer")
    rows: list[np.ndarray] = []
    counts: dict[str, dict[str, int]] = {}
    with (out / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for kind, documents in kinds.items():
            kept: list[np.ndarray] = []
            count = counts[kind] = {"documents": 0, "tokens": 0, "held_out_documents": 0, "too_short": 0}
            for document, ids in tokenize(documents, made):
                if len(kept) < held_out and len(ids) >= LONGER * length:
                    kept.append(ids[: LONGER * length])
                    file.write(json.dumps({"text": document}) + "\n")
                elif len(ids) < length:
                    count["too_short"] += 1
                elif (left := (tokens - count["tokens"]) // length) > 0:
                    rows.append(ids[: min(len(ids) // length, left) * length].reshape(-1, length))
                    count["documents"] += 1
                    count["tokens"] += rows[-1].size
                else:
                    break
            if len(kept) < held_out or not count["tokens"]:
                raise typer.BadParameter(
                    f"--text {kind} must have more than {held_out} documents of {LONGER * length:,} tokens, "
                    f"got {len(kept)} and {count['documents']} more of {length:,}"
                )
            count["held_out_documents"] = len(kept)
            np.save(out / "held_out" / f"{kind}.npy", np.stack(kept))
            print(f"{kind}: {count}", flush=True)
    (out / "text.json").write_text(json.dumps({"settings": settings, "kinds": counts}, indent=1))
    # Under another name until it is whole: what has its name is taken as done.
    np.save(out / "unfinished.npy", np.concatenate(rows))
    (out / "unfinished.npy").replace(out / "rows.npy")


def read_documents(file: Path, joined: int) -> Iterator[str]:
    """The documents of a ``.jsonl`` file, or the one of any other.

    Neighbors whose "source" lies in the same folder are one document until it has ``joined`` characters.
    """
    if file.suffix != ".jsonl":
        yield file.read_text(encoding="utf-8")
        return
    parts: list[str] = []
    before = None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                document = json.loads(line)
                text = document["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise typer.BadParameter(f'line {number} of {file} must be JSON with a "text": {error!r}') from None
            folder = document["source"].rpartition("/")[0] if "source" in document else None
            if parts and (folder is None or folder != before or sum(map(len, parts)) >= joined):
                yield "\n\n".join(parts)
                parts = []
            parts.append(text)
            before = folder
    if parts:
        yield "\n\n".join(parts)


def first_characters(documents: list[str], characters: int) -> Iterator[str]:
    """The first ``characters`` of the documents."""
    for document in documents:
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE learned from the documents."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(documents, vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, np.ndarray]]:
    """Each document with its tokens, ``[N]``, as they are asked for."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    # Some at a time, which the tokenizer spreads over the cores.
    for start in range(0, len(documents), 16):
        some = documents[start : start + 16]
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        yield from ((document, np.array(ids, kind)) for document, ids in zip(some, encoded, strict=True))


class Rows(Dataset):
    """The training rows, ``[N, length]``."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": row, "labels": row}


class StopAfter(TrainerCallback):
    """Saves a checkpoint and stops once so many minutes have passed, at a step whose loss is logged."""

    def __init__(self, minutes: float) -> None:
        self.ends = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.ends and state.global_step % state.logging_steps == 0:
            control.should_save = control.should_training_stop = True


def build_model(recipe: dict[str, Any], length: int, tokenizer: PreTrainedTokenizerBase) -> FoxForCausalLM:
    """A new model of one of `ARMS`, as the options of `train` want it."""
    kind, block = recipe["arm"].split("-")
    fields: dict[str, Any] = {
        # A multiple of 64 keeps the products with the embedding fast.
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "max_position_embeddings": length,
        "attention_sink": "learned" if recipe["sink"] else "none",
        "forget_gate": "full" if kind == "fox" else "none",
        "rope_parameters": ROTARY if kind == "transformer" or recipe["rope"] else None,
    }
    size = recipe["size"]
    if size == "45m":
        size, fields = "125m", fields | SMALL
    if recipe["layers"] is not None:
        fields["num_hidden_layers"] = recipe["layers"]
    if recipe["decay_times"] is not None:
        fields["decay_time_min"], fields["decay_time_max"] = recipe["decay_times"]
    model = FoxForCausalLM(FoxConfig.preset(f"{block}-{size}", **fields))
    for gate in model.modules():
        if isinstance(gate, FoxForgetGate):
            kept = len(gate.bias) - round(recipe["unforgetting"] * len(gate.bias))
            if recipe["unforgetting"] and kept == len(gate.bias):
                share = recipe["unforgetting"]
                raise typer.BadParameter(f"--unforgetting must be a head at least, got {share} of {kept} heads")
            # So long that a row hardly decays, while a gate can still learn to forget.
            gate.bias.data[kept:] = bias_for_times(torch.tensor(64.0 * length))
    return model


def build_optimizer(model: FoxForCausalLM, recipe: dict[str, Any]) -> torch.optim.Optimizer:
    """The authors' AdamW, with weight decay of matrices alone; or Muon for the matrices in the layers."""
    if recipe["optimizer"] == "muon":
        return MuonAndAdamW(model, recipe["muon_rate"], recipe["rate"], WEIGHT_DECAY)
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        decays = weight.ndim == 2 and "norm" not in name and ".sink." not in name
        groups.setdefault((".forget_gate." in name, decays), []).append(weight)
    return torch.optim.AdamW(
        [
            {
                "params": weights,
                "lr": recipe["rate"] * (recipe["gate_rate"] if gate else 1.0),
                "weight_decay": (recipe["gate_decay"] if gate else WEIGHT_DECAY) if decays else 0.0,
            }
            for (gate, decays), weights in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=torch.cuda.is_available(),
    )


@app.command()
def train(
    arm: Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")],
    out: Out = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Folder of the run in --out; the arm if not given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long; the same command goes on.")] = None,
    size: Size = "45m",
    layers: Layers = None,
    batch: Batch = 65536,
    steps: Steps = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "adamw",
    rate: Annotated[float, typer.Option(help="Peak learning rate of what AdamW trains.")] = 2e-3,
    muon_rate: Annotated[float, typer.Option(help="Peak learning rate of the matrices that Muon trains.")] = MUON_RATE,
    decay_times: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Gates start log-spaced between these; the default is the configuration's, 2 2048."),
    ] = None,
    unforgetting: Annotated[
        float, typer.Option(help="Share of each layer's heads that start at 64 times the rows' length instead.")
    ] = 0.0,
    gate_rate: Annotated[float, typer.Option(help="Learning rate of gates over that of all else.")] = 1.0,
    gate_decay: Annotated[float, typer.Option(help="Weight decay of the gates' weights.")] = WEIGHT_DECAY,
    rope: Annotated[bool, typer.Option("--rope", help="Rotary embeddings beside the gates.")] = False,
    sink: Annotated[bool, typer.Option("--sink", help="A learned attention sink.")] = False,
    seed: Seed = 0,
) -> None:
    """Train one model; its folder gets the model and training.json."""
    recipe: dict[str, Any] = {"arm": arm, "size": size, "layers": layers, "batch": batch, "optimizer": optimizer}
    recipe |= {"rate": rate, "muon_rate": muon_rate, "decay_times": decay_times and list(decay_times)}
    recipe |= {"unforgetting": unforgetting, "gate_rate": gate_rate, "gate_decay": gate_decay, "rope": rope}
    recipe |= {"sink": sink, "seed": seed}
    if not (out / "rows.npy").exists():
        raise typer.BadParameter(f"--out {out} holds no rows: call prepare first")
    tokens = np.load(out / "rows.npy", mmap_mode="r")
    length = tokens.shape[1]
    _check(recipe, tokens)
    steps = steps or tokens.size // batch
    recipe |= {"length": length, "steps": steps}
    folder = out / (name or arm)
    before = _trained_before(folder / "training.json", recipe)
    if before["steps_done"] == steps:
        return
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    set_seed(seed)
    model = build_model(recipe, length, tokenizer)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch // length,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        max_grad_norm=1.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        # What pruning skips is measured then, by a forward pass that is not compiled.
        logging_steps=max(1, steps // 60),
        # It would wait for the device at every step.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        seed=seed,
        dataloader_num_workers=2,
        # Layers are compiled for whole batches.
        dataloader_drop_last=True,
    )
    trainer = FoxTrainer(
        model,
        arguments,
        train_dataset=Rows(tokens),
        optimizers=(build_optimizer(model, recipe), None),
        callbacks=[] if minutes is None else [StopAfter(minutes)],
    )
    began = time.monotonic()
    checkpoint = get_last_checkpoint(str(folder)) if before["steps_done"] else None
    trainer.train(resume_from_checkpoint=checkpoint)
    done = trainer.state.global_step
    seconds = before["seconds"] + time.monotonic() - began
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {
        "arm": arm,
        "parameters": model.num_parameters(),
        "steps_done": done,
        "tokens": done * batch,
        "seconds": seconds,
        "tokens_per_second": done * batch / seconds,
        # With the tokens per second since the entry before, without the time it took to log.
        "history": history,
        "recipe": recipe,
        "run": provenance("cuda" if on_gpu else "cpu", seed, ("triton",)),
    }
    if done == steps:
        save(model, tokenizer, folder)
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    # Only the last checkpoint is gone on from, and none once all steps are done.
    for old in folder.glob("checkpoint-*"):
        if done == steps or old.name != f"checkpoint-{done}":
            shutil.rmtree(old)
    print(f"{folder.name}: {record['tokens']:,} tokens in {seconds:.0f} s, loss {history[-1]['loss']:.3f}", flush=True)


def _check(recipe: dict[str, Any], tokens: np.ndarray) -> None:
    """Refuse options that are none or would do nothing."""
    for option, accepted in ("arm", ARMS), ("optimizer", OPTIMIZERS), ("size", SIZES):
        if recipe[option] not in accepted:
            raise typer.BadParameter(f"--{option} must be one of {', '.join(accepted)}, got {recipe[option]!r}")
    if recipe["batch"] % tokens.shape[1] or not tokens.shape[1] <= recipe["batch"] <= tokens.size:
        raise typer.BadParameter(
            f"--batch must be a multiple of the rows' length, {tokens.shape[1]:,}, and at most the {tokens.size:,} "
            f"tokens of the text, got {recipe['batch']:,}"
        )
    if not 0.0 <= recipe["unforgetting"] <= 1.0:
        raise typer.BadParameter(f"--unforgetting must be a share in [0, 1], got {recipe['unforgetting']}")
    low, high = recipe["decay_times"] or (1.0, 1.0)
    if not 0.0 < low <= high:
        raise typer.BadParameter(f"--decay-times must be two times in order, above 0, got {low} {high}")
    if recipe["optimizer"] == "adamw" and recipe["muon_rate"] != MUON_RATE:
        raise typer.BadParameter("--muon-rate is for --optimizer muon, got adamw")
    for option, default in OF_GATES.items():
        if recipe[option] == default:
            continue
        flag = "--" + option.replace("_", "-")
        if recipe["arm"].startswith("transformer"):
            raise typer.BadParameter(f"{flag} is for arms with gates, got --arm {recipe['arm']}")
        if recipe["optimizer"] == "muon" and option in ("gate_rate", "gate_decay"):
            raise typer.BadParameter(f"{flag} is for --optimizer adamw, got muon")


def _trained_before(record: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What was trained in earlier pieces, if that was with the same settings."""
    if not record.exists():
        return {"steps_done": 0, "seconds": 0.0}
    found = json.loads(record.read_text())
    for name, wanted in recipe.items():
        if found["recipe"].get(name) != wanted:
            trained = found["recipe"].get(name)
            raise typer.BadParameter(f"{record} is of a model trained with {name} {trained}, now it is {wanted}")
    return found


def save(model: FoxForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As it is meant to be used: bfloat16, but for the gates, whose decay times bfloat16 would move."""
    for name, weight in model.named_parameters():
        if ".forget_gate." not in name:
            weight.data = weight.data.bfloat16()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@app.command()
def evaluate(
    out: Out = Path("runs"),
    samples: Annotated[int, typer.Option(help="Needles at each length and depth.")] = 20,
) -> None:
    """Loss by position on each kind of text, needles, and the pruning report of runs with gates."""
    runs = {file.parent: json.loads(file.read_text())["recipe"] for file in sorted(out.glob("*/training.json"))}
    runs = {folder: recipe for folder, recipe in runs.items() if (folder / "model").exists()}
    if not runs:
        raise typer.BadParameter(f"--out holds no trained model: {out}")
    length = next(iter(runs.values()))["length"]
    models = [str(folder / "model") for folder in runs]
    names = [part for folder in runs for part in ("--name", folder.name)]
    for rows in sorted((out / "held_out").glob("*.npy")):
        foxlm("loss", *models, *names, "--text", str(rows), "--length", str(LONGER * length),
              "--rows", str(len(np.load(rows, mmap_mode="r"))), "--out", str(out / "loss" / rows.stem))  # fmt: skip
    # Shorter ones have no room for the question and its answer.
    lengths = [str(LONGER * length // 2**power) for power in range(4, -1, -1) if LONGER * length // 2**power >= 512]
    held_out = str(out / "held_out.jsonl")
    for folder, recipe in runs.items():
        model = str(folder / "model")
        foxlm("needle", model, "--text", held_out, "--lengths", ",".join(lengths), "--samples", str(samples),
              "--score-only", "--out", str(folder / "needle"))  # fmt: skip
        if recipe["arm"].startswith("fox") and not (folder / "report" / "report.json").exists():
            foxlm("report", model, "--text", held_out, "--length", str(length), "--out", str(folder / "report"))


def foxlm(*arguments: str) -> None:
    """A command of foxlm, in a process of its own."""
    print("foxlm", *arguments, flush=True)
    if subprocess.run([sys.executable, "-m", "foxlm", *arguments], check=False).returncode:
        # It has said why.
        raise typer.Exit(1)


@app.command(name="all")
def run_all(
    text: Text,
    out: Out = Path("runs"),
    vocabulary: Vocabulary = 16384,
    tokenizer: Tokenizer = None,
    length: Length = 16384,
    tokens: Tokens = 20_000_000,
    held_out: HeldOut = 8,
    size: Size = "45m",
    layers: Layers = None,
    batch: Batch = 65536,
    steps: Steps = None,
    seed: Seed = 0,
) -> None:
    """Prepare, train every arm one after the other, and evaluate."""
    prepare(text, out, vocabulary, tokenizer, length, tokens, held_out)
    for arm in ARMS:
        train(arm, out, size=size, layers=layers, batch=batch, steps=steps, seed=seed)
    evaluate(out)


if __name__ == "__main__":
    app()
