"""Pretrain a FoX on text files with transformers' Trainer.

A byte-level model of a few million parameters on a folder of text:

    python examples/pretrain.py --text my_folder --output_dir out --hidden_size 256 --num_hidden_layers 4 \
        --num_attention_heads 4 --max_steps 500 --per_device_train_batch_size 8 --learning_rate 1e-3

A model of the paper with a tokenizer of your own, in bfloat16, going on where it stopped:

    torchrun --nproc_per_node 8 examples/pretrain.py --preset pro-125m --tokenizer my_tokenizer --text my_folder \
        --output_dir out --length 4096 --bf16 --gradient_checkpointing --torch_compile --resume

On several GPUs with weights, gradients and optimizer state sharded over them (FSDP2; hsdp.yaml and ddp.yaml beside it):

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 examples/pretrain.py \
        --preset pro-760m --text my_folder --output_dir out --length 16384 --per_device_train_batch_size 1 --resume

Its checkpoints are sharded, and `--resume` takes them up on any number of GPUs; the model saved at the end is whole.
Keep the product of processes, `--per_device_train_batch_size` and `--gradient_accumulation_steps`, and the loss goes on
as it would have.

DeepSpeed, where it is installed (weights and gates in float32, products in bfloat16 by its autocast; without --bf16):

    torchrun --nproc_per_node 2 examples/pretrain.py --deepspeed examples/accelerate/deepspeed_zero3.json ...

Each sequence shared by two GPUs, for documents that one cannot hold (any engine above, or torchrun alone):
`--context_parallel 2`.

A sequence whose logits would not fit, as from about 65,536 tokens on: `--loss_chunk_size 8192`.

Documents are packed without padding: decay and token shift begin anew with each (`DataCollatorWithFlattening`).
Every other option is one of `TrainingArguments`.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.modeling.parallel.fsdp import FoxParallelismConfig, prepare_fsdp2, save_whole_model
from foxlm.training import FoxTrainer


@dataclass
class PretrainingArguments:
    text: list[str] = field(metadata={"help": "text files, or folders of them, one document per file"})
    suffix: str = field(default=".txt", metadata={"help": "of the files to take from folders"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder of a tokenizer; bytes if not given"})
    length: int = field(default=512, metadata={"help": "longest sequence, in tokens; longer documents are split"})
    held_out: float = field(default=0.05, metadata={"help": "share of the sequences to evaluate on"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})
    preset: str | None = field(default=None, metadata={"help": "a model of the paper: pro-125m, llama-360m, ..."})
    hidden_size: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "instead of the preset's"})
    context_parallel: int = field(default=1, metadata={"help": "GPUs that share each sequence"})
    loss_chunk_size: int | None = field(default=None, metadata={"help": "tokens whose logits are held at a time"})


class Sequences(Dataset):
    """Tokens of all documents, each ended by the end-of-text token and split at every ``length`` tokens."""

    def __init__(self, documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.pieces: list[torch.Tensor] = []
        for document in documents:
            tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
            self.pieces += torch.tensor([*tokens, tokenizer.eos_token_id]).split(length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.pieces[index].tolist()}


def read_documents(paths: list[str], suffix: str) -> list[str]:
    """The text of all files, those in folders in order of their names."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--text must name text files or folders with *{suffix} files, got {paths}")
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def build_config(own: PretrainingArguments, tokenizer: PreTrainedTokenizerBase) -> FoxConfig:
    """The preset, or the default configuration, with the sizes that were given and the tokenizer's tokens."""
    sizes = {
        name: value
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "loss_chunk_size")
        if (value := getattr(own, name)) is not None
    }
    tokens = {
        # A multiple of 64 keeps the products with the embedding fast.
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if own.preset is None:
        return FoxConfig(max_position_embeddings=own.length, **sizes, **tokens)
    return FoxConfig.preset(own.preset, max_position_embeddings=own.length, **sizes, **tokens)


def check_processes(training: TrainingArguments) -> None:
    """Refuse processes that would train each alone, into the same folder, and sizes of groups that they do not fill."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != training.world_size:
        raise ValueError(
            f"{started} processes were started, but training sees {training.world_size}, on {training.device}: "
            "several need a GPU each, or --use_cpu"
        )
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        prefix, ending = "PARALLELISM_CONFIG_", "_SIZE"
        names = sorted(name for name in os.environ if name.startswith(prefix) and name.endswith(ending))
        sizes = {name.removeprefix(prefix).lower(): int(os.environ[name]) for name in names}
        if math.prod(sizes.values()) != started:
            got = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"the sizes of parallelism_config must multiply to {started} processes, got {got}")


def share_sequences(ranks: int, training: TrainingArguments) -> FoxParallelismConfig:
    """Groups of ``ranks`` processes that share each sequence."""
    if ranks < 1 or training.world_size % ranks:
        raise ValueError(
            f"--context_parallel must divide the number of processes, {training.world_size}, got {ranks}: "
            "start more, by torchrun or accelerate launch"
        )
    if training.parallelism_config is not None:
        raise ValueError("--context_parallel sets the sizes of groups itself: it goes without a parallelism_config")
    return FoxParallelismConfig(cp_size=ranks, dp_shard_size=training.world_size // ranks)


def is_complete(checkpoint: Path) -> bool:
    """Whether its saving was not interrupted."""
    try:
        # What Trainer writes last.
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (FileNotFoundError, json.JSONDecodeError):
        print(f"{checkpoint} was not saved to its end and is left aside")
        return False
    return True


def last_checkpoint(folder: str) -> str | None:
    """The newest complete checkpoint; None if there is none."""
    newest_first = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[-1]))
    return next((str(path) for path in newest_first if is_complete(path)), None)


def main(arguments: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((PretrainingArguments, TrainingArguments))
    own, training = parser.parse_args_into_dataclasses(arguments)
    if own.length < 2 or not 0 <= own.held_out < 1:
        raise ValueError(f"--length must be at least 2 and --held_out in [0, 1), got {own.length} and {own.held_out}")
    check_processes(training)
    if own.context_parallel != 1:
        training.parallelism_config = share_sequences(own.context_parallel, training)
    set_seed(training.seed)
    tokenizer = byte_tokenizer() if own.tokenizer is None else AutoTokenizer.from_pretrained(own.tokenizer)
    sequences = Sequences(read_documents(own.text, own.suffix), tokenizer, own.length)
    held_out = int(own.held_out * len(sequences))
    evaluated, trained = torch.utils.data.random_split(sequences, [held_out, len(sequences) - held_out])
    model = FoxForCausalLM(build_config(own, tokenizer))
    if training.process_index == 0:
        print(
            f"{model.num_parameters() / 1e6:.1f}M parameters, {len(trained)} sequences to train on, {held_out} held out"
        )

    trainer = FoxTrainer(
        model,
        training,
        train_dataset=trained,
        eval_dataset=evaluated if held_out else None,
        processing_class=tokenizer,
        # position_ids restart at each document; FoX resets decay and token shift there.
        data_collator=DataCollatorWithFlattening(),
    )
    prepare_fsdp2(trainer.accelerator, trainer.model)
    if own.context_parallel != 1:
        model.set_context_parallel(ContextParallel(trainer.accelerator.torch_device_mesh["cp"]))
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir) if own.resume else None)
    if held_out:
        trainer.log_metrics("eval", trainer.evaluate())
    save_whole_model(trainer)
    return trainer


if __name__ == "__main__":
    main()
