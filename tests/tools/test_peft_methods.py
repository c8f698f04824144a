"""Every method of PEFT that a decoder can have trains, reloads and generates on a FoX model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import tiny_model, tokens

peft = pytest.importorskip("peft")

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LoraConfig", QV | {"r": 4, "use_dora": True}),
    "rslora": ("LoraConfig", QV | {"r": 4, "use_rslora": True}),
    "pissa": ("LoraConfig", QV | {"r": 4, "init_lora_weights": "pissa"}),
    "adalora": ("AdaLoraConfig", QV | {"init_r": 4, "target_r": 2, "total_step": 10}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", QV | {"r": 4}),
    "lokr": ("LoKrConfig", QV | {"r": 4}),
    "oft": ("OFTConfig", QV | {"r": 0, "oft_block_size": 8}),
    "boft": ("BOFTConfig", QV | {"boft_block_size": 4}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "fourierft": ("FourierFTConfig", QV | {"n_frequency": 50}),
    "hra": ("HRAConfig", QV | {"r": 4}),
    "layer-norm": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "vblora": ("VBLoRAConfig", QV | {"r": 4, "num_vectors": 8, "vector_length": 16}),
    "miss": ("MissConfig", QV | {"r": 4}),
    "c3a": ("C3AConfig", QV | {"block_size": 8}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [3, 4, 5, 6]}),
    "randlora": ("RandLoraConfig", QV | {"r": 4}),
    "shira": ("ShiraConfig", QV | {"r": 2}),
    "road": ("RoadConfig", QV | {"group_size": 8}),
    "poly": ("PolyConfig", QV | {"r": 4, "n_tasks": 1}),
    "waveft": ("WaveFTConfig", QV | {"n_frequency": 50}),
    "delora": ("DeloraConfig", QV | {"r": 4}),
    "gralora": ("GraloraConfig", QV | {"r": 4}),
    "osf": ("OSFConfig", QV),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 32}),
    "multitask-prompt": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 1}),
}


def base() -> Any:
    return tiny_model(dtype=torch.float32, initializer_range=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_reloads_and_generates(method: str, tmp_path: Path) -> None:
    name, options = METHODS[method]
    model = peft.get_peft_model(base(), getattr(peft, name)(task_type="CAUSAL_LM", **options)).train()
    ids = tokens(4, 4).repeat(1, 3)
    tasks = {"task_ids": torch.zeros(4, dtype=torch.long)} if method in ("poly", "multitask-prompt") else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, **tasks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]

    @torch.no_grad()
    def logits(adapted: Any) -> Tensor:
        return adapted(input_ids=ids, **tasks).logits

    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **tasks}
    prompt = ids[:, :7]
    expected = model.generate(input_ids=prompt, use_cache=False, **how)
    assert torch.equal(model.generate(input_ids=prompt, **how), expected)
