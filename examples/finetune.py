"""Finetune a language model that `AutoModelForCausalLM` loads, whole or by LoRA, on texts or conversations.

    python examples/finetune.py --model out --data notes.txt --output_dir tuned --max_steps 200 --learning_rate 1e-4
    python examples/finetune.py --model out --data chats.jsonl --output_dir tuned --lora --num_train_epochs 1

Lines of a ``.jsonl`` file are ``{"text": ...}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``; of any other
file, each paragraph (separated by an empty line) is an example. Conversations use the tokenizer's chat template, or
`PLAIN_TEMPLATE` if it has none. With LoRA the forget gates are trained in full and saved with the adapter: they are a
vector per head, and they decide what a head may see.
Every other option is one of `TrainingArguments`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from foxlm import peft_targets
from foxlm.modeling.parallel.fsdp import prepare_fsdp2, save_whole_model
from foxlm.training import FoxTrainer

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass
class FinetuningArguments:
    model: str = field(metadata={"help": "folder of the model and its tokenizer"})
    data: str = field(metadata={"help": "a .jsonl file of texts or conversations, or a text file"})
    length: int = field(default=512, metadata={"help": "longest example, in tokens; longer ones are truncated"})
    lora: bool = field(default=False, metadata={"help": "train a LoRA and the forget gates (needs peft)"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the LoRA"})


class Examples(Dataset):
    """Tokenized examples, each ended by the end-of-text token."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        texts = [text for text in read_examples(path, tokenizer) if text.strip()]
        if not texts:
            raise ValueError(f"--data must hold at least one example, got none in {path}")
        self.tokens = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:length] for text in texts
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.tokens[index]}


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each example."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return content.split("\n\n")
    texts = []
    # Not splitlines, which also splits at characters that JSON strings may hold.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} must be a JSON object: {error.msg}") from None
        if isinstance(row, dict) and "messages" in row:
            texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        elif isinstance(row, dict) and isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            raise ValueError(f'{path}:{number} must have a string "text" or "messages", got {line[:80]}')
    return texts


def add_lora(model, rank: int):
    """The model with a LoRA: of a FoX model by `peft_targets`, of others by PEFT's defaults."""
    from peft import LoraConfig, get_peft_model

    targets = peft_targets(model) if model.config.model_type == "fox" else {}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, **targets))


def main(arguments: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((FinetuningArguments, TrainingArguments))
    own, training = parser.parse_args_into_dataclasses(arguments)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(own.model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    examples = Examples(Path(own.data), tokenizer, own.length)
    model = AutoModelForCausalLM.from_pretrained(own.model)
    # A new adapter would replace the one that such a folder holds, and without --lora almost nothing would be trained.
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"--model must be a whole model, got the adapter {own.model}; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)"
        )
    if own.lora:
        model = add_lora(model, own.lora_rank)
        model.print_trainable_parameters()
    trainer = FoxTrainer(
        model,
        training,
        train_dataset=examples,
        processing_class=tokenizer,
        # Examples are packed without padding; position_ids restart at each, where FoX resets decay and token shift.
        data_collator=DataCollatorWithFlattening(),
    )
    prepare_fsdp2(trainer.accelerator, trainer.model)
    trainer.train()
    save_whole_model(trainer)
    return trainer


if __name__ == "__main__":
    main()
