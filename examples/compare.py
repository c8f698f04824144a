"""Train Forgetting Transformers and Transformers of the same sizes on the same text, and compare them.

    python examples/compare.py all --text corpus.jsonl --out runs

does these, each of which can be called alone, and skips what it finds done:

    python examples/compare.py prepare --text corpus.jsonl --out runs     # tokenizer, tokens, held-out documents
    python examples/compare.py train --arm fox-pro --out runs             # one model; four arms on four GPUs at once
    python examples/compare.py evaluate --out runs                        # loss by position, needle, pruning report

The arms are the four models of the Forgetting Transformer's paper: its two blocks, `pro` and `llama`, each with forget
gates (`fox-`) and with rotary embeddings in their place (`transformer-`). All else is the same: code, sizes, text, its
order, steps and learning rates.
"""

import json
import random
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
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.evaluation.demo.optimizer import MuonAndAdamW
from foxlm.evaluation.provenance import provenance
from foxlm.training import FoxTrainer

ARMS = ("fox-pro", "transformer-pro", "fox-llama", "transformer-llama")
# What position costs a Transformer: rotary embeddings with the base that the FoX paper gives its baselines.
ROTARY = {"rope_type": "default", "rope_theta": 500_000.0}
END_OF_TEXT = "<|endoftext|>"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder of the whole comparison.")]
Text = Annotated[list[Path], typer.Option(help='.jsonl files with a "text" in each line, or .txt. Repeatable.')]
Vocabulary = Annotated[int, typer.Option(help="Of the tokenizer trained on the text.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of a tokenizer to take instead.")]
HeldOut = Annotated[float, typer.Option(help="Share of the documents that are held out.")]
Size = Annotated[str, typer.Option(help="125m, 360m or 760m, as in the paper.")]
Layers = Annotated[int | None, typer.Option(help="Fewer layers than that, for a trial.")]
Length = Annotated[int, typer.Option(help="Tokens of a training example.")]
Batch = Annotated[int, typer.Option(help="Examples in a step.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps; one pass over the text if not given.")]
MuonRate = Annotated[float, typer.Option(help="Peak learning rate of the matrices in the layers, which Muon trains.")]
AdamwRate = Annotated[float, typer.Option(help="Peak learning rate of all else, which AdamW trains.")]
Seed = Annotated[int, typer.Option(help="Of weights and order.")]


@app.command()
def prepare(
    text: Text,
    out: Out = Path("runs"),
    vocabulary: Vocabulary = 16384,
    tokenizer: Tokenizer = None,
    held_out: HeldOut = 0.02,
    seed: Seed = 0,
) -> None:
    """Make the tokenizer, the training tokens in a random order of documents, and the held-out documents."""
    if (out / "tokens.npy").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    trained: list[str] = []
    kept: list[str] = []
    for document in (document for file in text for document in read_documents(file)):
        # By what the document says, so that it stays held out whatever else is added.
        (kept if zlib.crc32(document.encode()) < held_out * 2**32 else trained).append(document)
    if not trained or not kept:
        raise typer.BadParameter(f"--text has {len(trained)} documents to train on and {len(kept)} held out")
    random.Random(seed).shuffle(trained)
    made = train_tokenizer(trained, vocabulary) if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    made.save_pretrained(out / "tokenizer")
    with (out / "held_out.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in kept)
    tokens = tokenize(trained, made)
    print(f"{len(trained):,} documents, {len(tokens):,} tokens to train on; {len(kept):,} documents held out")
    # Under another name until it is whole: what has its name is taken as done.
    np.save(out / "unfinished.npy", tokens)
    (out / "unfinished.npy").replace(out / "tokens.npy")


def read_documents(file: Path) -> Iterator[str]:
    """The texts of a ``.jsonl`` file, or the one of any other."""
    if file.suffix != ".jsonl":
        yield file.read_text(encoding="utf-8")
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer(documents: list[str], vocabulary: int, characters: int = 60_000_000) -> PreTrainedTokenizerBase:
    """Byte-level BPE learned from the first ``characters`` of the documents."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    def some() -> Iterator[str]:
        left = characters
        for document in documents:
            yield document[:left]
            left -= len(document)
            if left <= 0:
                return

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(some(), vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All documents, each ended by the end-of-text token: ``[N]``."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = np.array([tokenizer.eos_token_id], kind)
    parts: list[np.ndarray] = []
    # Many at a time, which the tokenizer spreads over the cores.
    for start in range(0, len(documents), 256):
        encoded = tokenizer(documents[start : start + 256], add_special_tokens=False, verbose=False)["input_ids"]
        parts += [part for ids in encoded for part in (np.array(ids, kind), end)]
    return np.concatenate(parts)


class Rows(Dataset):
    """Rows of ``length`` consecutive tokens of the whole text."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        if len(tokens) < length:
            raise ValueError(f"--length must be at most the {len(tokens):,} tokens of the text, got {length}")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": row, "labels": row}


def build_model(arm: str, size: str, length: int, tokenizer: PreTrainedTokenizerBase, **sizes: Any) -> FoxForCausalLM:
    """A new model of one of `ARMS`."""
    kind, block = arm.split("-")
    position = {} if kind == "fox" else {"forget_gate": "none", "rope_parameters": ROTARY}
    tokens = {
        # A multiple of 64 keeps the products with the embedding fast.
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    config = FoxConfig.preset(f"{block}-{size}", max_position_embeddings=length, **position, **tokens, **sizes)
    return FoxForCausalLM(config)


@app.command()
def train(
    arm: Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")],
    out: Out = Path("runs"),
    size: Size = "125m",
    layers: Layers = None,
    length: Length = 16384,
    batch: Batch = 4,
    steps: Steps = None,
    muon_rate: MuonRate = 6e-3,
    adamw_rate: AdamwRate = 3e-3,
    seed: Seed = 0,
) -> None:
    """Train one model; its folder gets the model and training.json."""
    if arm not in ARMS:
        raise typer.BadParameter(f"--arm must be one of {', '.join(ARMS)}, got {arm!r}")
    folder = out / arm
    recipe = {"size": size, "length": length, "batch": batch, "muon_rate": muon_rate, "adamw_rate": adamw_rate}
    if (folder / "training.json").exists():
        _require_same_training(folder / "training.json", recipe, steps)
        return
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    rows = Rows(np.load(out / "tokens.npy", mmap_mode="r"), length)
    set_seed(seed)
    model = build_model(arm, size, length, tokenizer, **({} if layers is None else {"num_hidden_layers": layers}))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    steps = steps or len(rows) // batch
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=max(1, steps // 200),
        save_strategy="no",
        report_to="none",
        seed=seed,
        dataloader_num_workers=2,
    )
    optimizer = MuonAndAdamW(model, muon_rate, adamw_rate, weight_decay=0.1)
    trainer = FoxTrainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    save(model, tokenizer, folder)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    record = {
        "arm": arm,
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * batch * length,
        "seconds": seconds,
        "tokens_per_second": steps * batch * length / seconds,
        "losses": losses,
        "recipe": recipe,
        "run": provenance("cuda" if on_gpu else "cpu", seed, ("triton",)),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    print(f"{arm}: {record['tokens']:,} tokens in {seconds:.0f} s, loss {losses[-1][1]:.3f} at the end")


def _require_same_training(record: Path, recipe: dict[str, Any], steps: int | None) -> None:
    """Refuse to take a model for one that was asked for with other settings."""
    found = json.loads(record.read_text())
    for name, wanted in (recipe | ({} if steps is None else {"steps": steps})).items():
        trained = found["recipe"].get(name, found.get(name))
        if trained != wanted:
            raise typer.BadParameter(f"{record} is of a model trained with {name} {trained}, now it is {wanted}")


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
    longest: Annotated[int | None, typer.Option(help="Tokens to look at; four times the trained length.")] = None,
    rows: Annotated[int, typer.Option(help="Held-out rows for the loss by position.")] = 24,
    samples: Annotated[int, typer.Option(help="Needles at each length and depth.")] = 20,
) -> None:
    """Loss by position of all arms that were trained, needles, and the pruning report of those with gates."""
    arms = [arm for arm in ARMS if (out / arm / "training.json").exists()]
    if not arms:
        raise typer.BadParameter(f"--out holds no trained model: {out}")
    length = json.loads((out / arms[0] / "training.json").read_text())["recipe"]["length"]
    longest = longest or 4 * length
    held_out = str(out / "held_out.jsonl")
    models = {arm: str(out / arm / "model") for arm in arms}
    names = [part for arm in arms for part in ("--name", arm)]
    foxlm("loss", *models.values(), *names, "--text", held_out, "--length", str(longest), "--rows", str(rows),
          "--out", str(out / "loss"))  # fmt: skip
    # Shorter ones have no room for the question and its answer.
    lengths = [str(longest // 2**power) for power in range(4, -1, -1) if longest // 2**power >= 512]
    for arm, model in models.items():
        foxlm("needle", model, "--text", held_out, "--lengths", ",".join(lengths), "--samples", str(samples),
              "--score-only", "--out", str(out / arm / "needle"))  # fmt: skip
        if arm.startswith("fox") and not (out / arm / "report" / "report.json").exists():
            foxlm("report", model, "--text", held_out, "--length", str(length), "--out", str(out / arm / "report"))


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
    held_out: HeldOut = 0.02,
    size: Size = "125m",
    layers: Layers = None,
    length: Length = 16384,
    batch: Batch = 4,
    steps: Steps = None,
    muon_rate: MuonRate = 6e-3,
    adamw_rate: AdamwRate = 3e-3,
    seed: Seed = 0,
) -> None:
    """Prepare, train every arm one after the other, and evaluate."""
    prepare(text, out, vocabulary, tokenizer, held_out, seed)
    for arm in ARMS:
        train(arm, out, size, layers, length, batch, steps, muon_rate, adamw_rate, seed)
    evaluate(out)


if __name__ == "__main__":
    app()
