"""Tensor parallelism on two ranks equals one process for every variant of the model; the rest is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from foxlm import FoxConfig, FoxForCausalLM
from foxlm.modeling.parallel.tensor_parallel import check_tensor_parallel
from models import VARIANTS, assert_close, tiny_config, tiny_model
from ranks import run_ranks
from tensor_parallel_checks import GENERATED, train_by_hand, train_by_trainer

# A vocabulary that two ranks share; transformers 5.17 takes no other.
VOCABULARY = 98
# One key/value head cannot be dealt to two ranks.
REFUSED = "multi-query"
TOLERANCE = 1e-9
# Entries of the plan, and what is wrong without them.
WEAKENED = {
    "shared-qk-norm": ("q_norm", "gradient of model.layers.0.self_attn.q_norm.weight"),
    "key-value-gates": ("forget_gate", "logits"),
}


def save(folder: Path, variant: str = "pro", **overrides: Any) -> Path:
    model = tiny_model(variant, **({"vocab_size": VOCABULARY} | overrides))
    # So that all rows are as long.
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / variant)
    return folder / variant


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    folders = {}
    for variant in VARIANTS:
        if variant != REFUSED:
            short = variant not in GENERATED and "nope_layers" not in VARIANTS[variant]
            folders[variant] = save(tmp_path, variant, **({"num_hidden_layers": 1} if short else {}))
    for rank, measured in enumerate(run_ranks("tensor_parallel_checks:compare", 2, folders, timeout=600)):
        freed = {variant: found.pop("pages freed", None) for variant, found in measured.items()}
        for variant, found in measured.items():
            wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
            assert not wrong, f"{variant} on rank {rank}: {wrong}"
        assert set(measured) == set(folders)
        # Where nothing is freed, a paged cache shows nothing.
        assert all(freed[variant] > 0 for variant in ("pro", "rope", "olmo", "bias-only", "key-value-gates"))


@pytest.mark.slow
def test_training_and_what_is_refused(tmp_path: Path) -> None:
    trained = save(tmp_path / "trained", "shared-qk-norm", initializer_range=0.1, dtype=torch.float32)
    weakened = {variant: save(tmp_path, variant) for variant in WEAKENED}
    entries = {variant: entry for variant, (entry, _) in WEAKENED.items()}
    refused = {"heads": save(tmp_path / "refused", REFUSED), "processes": weakened["key-value-gates"]}
    results = run_ranks(
        "tensor_parallel_checks:train_and_refuse",
        2,
        *(trained, tmp_path / "two", weakened, entries, refused, {"heads": 2, "processes": 4}),
        environment={"ACCELERATE_USE_CPU": "false"},
    )
    expected = train_by_hand(trained, 1), train_by_trainer(trained, tmp_path / "one", 1)
    for (by_hand, by_trainer), without, said in results:
        assert by_hand == pytest.approx(expected[0], rel=1e-5)
        assert by_trainer == pytest.approx(expected[1], rel=1e-5)
        for variant, (_, name) in WEAKENED.items():
            assert without[variant][name] > 1e-3, f"{variant}: nobody would notice"
        assert said["heads"] == "tp_size must divide num_key_value_heads (1), got 2; this model takes [1]"
        assert said["processes"].startswith(
            "distributed_config must be for the number of processes, got tp_size=4 with 2"
        )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert list(one) == list(two)
    for name, weight in one.items():
        assert_close(two[name], weight, 1e-4)


@pytest.mark.parametrize(
    ("fields", "ranks", "said"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, r"num_key_value_heads \(3\), got 2; .* \[1, 3\]"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, 4, r"num_attention_heads \(6\) and num_key_value_heads"),
        ({"num_key_value_heads": 4, "intermediate_size": 50}, 4, r"intermediate_size \(50\), got 4; .* \[1, 2\]"),
        ({"qk_norm": "all_heads", "head_dim": 5}, 3, r"num_attention_heads \* head_dim \(20\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(fields: dict[str, Any], ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^tp_size must divide .*{said}"):
        check_tensor_parallel(tiny_config(**fields), ranks)


def test_one_norm_over_all_heads_takes_fewer_heads_than_ranks() -> None:
    check_tensor_parallel(FoxConfig(qk_norm="all_heads", num_key_value_heads=1), 4)


@pytest.mark.parametrize("config", [DistributedConfig(tp_size=2), {"tp_size": 2}, DistributedConfig(fsdp_size=3)])
def test_one_process_where_several_are_asked_for(config: Any, tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(
        ValueError, match=r"got (tp_size=2|fsdp_size=3) with 1 process: .* torchrun --nproc_per_node [23]"
    ):
        FoxForCausalLM.from_pretrained(folder, distributed_config=config)
