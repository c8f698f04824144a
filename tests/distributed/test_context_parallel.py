"""Context parallelism on two to four ranks equals one device: attention, models, gradients, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foxlm import FoxForSequenceClassification
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.kernels.context_parallel.partition import NAMED_SPLITS, Segment, TokenSplit, zigzag
from foxlm.kernels.context_parallel.shards import CommunicationVolume
from foxlm.modeling.versions import CACHE
from kernel_device import INTERPRETED
from models import tiny_model
from ranks import run_ranks

pytestmark = pytest.mark.skipif(INTERPRETED, reason="ranks choose for themselves")


@pytest.mark.parametrize(("ranks", "seeds"), [(2, range(0, 30)), (3, range(30, 50)), (4, range(50, 70))])
def test_attention_of_one_device(ranks: int, seeds: range) -> None:
    """Ragged, packed, padded, with resets, pruned and not, split evenly and anyhow."""
    compared = 0
    for of_rank in run_ranks("context_checks:attention_errors", ranks, seeds):
        for case in of_rank:
            if case["prunes_alike"]:
                compared += 1
                assert max(case["errors"].values()) < 1e-5, case
            else:
                # Both leave out at most eps = 1e-4 of a row, not the same keys.
                assert max(case["errors"].values()) < 5e-3, case
    assert compared > ranks * len(seeds) // 2


@pytest.mark.slow
def test_attention_on_interpreted_kernels() -> None:
    """What runs on a GPU: kernels for gates, pruning and attention."""
    found = run_ranks(
        "context_checks:attention_errors",
        2,
        range(100, 104),
        300,
        16,
        environment={"TRITON_INTERPRET": "1"},
        fresh=True,
    )
    for of_rank in found:
        for case in of_rank:
            limit = 1e-5 if case["prunes_alike"] else 5e-3
            assert max(case["errors"].values()) < limit, case


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_attention_of_one_gpu() -> None:
    """By NCCL, within the rounding of bfloat16: padded, packed, pruned by either rule, grouped, and a token or two."""
    # Nearly all of it is compiling kernels, anew for what each case has of options: with -s each says when it is done.
    cases = [(64, 400), (64, 401), (64, 403), (64, 404), (128, 414)]
    for of_rank in run_ranks("context_checks:attention_errors_on_gpus", 2, cases, timeout=600, show=True, fresh=True):
        for case in of_rank:
            assert max(case["errors"].values()) < 2e-2, case


def test_notices_gates_that_are_not_carried_over() -> None:
    found = run_ranks("context_checks:attention_errors_without_carry", 2, range(6))
    assert max(max(case["errors"].values()) for case in found[1]) > 1e-2


def test_models_of_one_device() -> None:
    variants = ["pro", "llama-rope", "key-value-gates", "multi-query", "bias-only", "fixed", "olmo", "tied"]
    variants.append("rope-sink")
    for of_rank in run_ranks("context_checks:model_errors", 2, variants):
        for case, errors in of_rank.items():
            # Cross entropy and rotary angles are in float32.
            assert max(errors.values()) < 3e-6, (case, errors)


def test_models_on_four_ranks() -> None:
    for of_rank in run_ranks("context_checks:model_errors", 4, ["pro"]):
        for case, errors in of_rank.items():
            assert max(errors.values()) < 3e-6, (case, errors)


def test_traffic_dropout_and_refusals() -> None:
    (shares, *_), (error, *_) = (
        run_ranks("context_checks:traffic_shares", 2, 4096),
        run_ranks("context_checks:dropout_is_the_same_backward", 2),
    )
    # Without forgetting: three quarters, since half of a rank's remote queries need nothing of the last segment.
    assert 0.7 < shares["never"] < 0.8
    assert shares["forgets"] < 0.25
    assert error < 1e-6
    said = run_ranks("context_checks:refusals", 2)[0]
    for name, part in {
        "generate": f"{CACHE} must be None with context parallelism",
        "cache": f"{CACHE} must be None with context parallelism",
        "logits_to_keep": "logits_to_keep must be 0",
        "short": "split must give every rank a token, got none of 1 for",
        "sdpa": "attn_implementation must be one of ['fox', 'fox_reference'], got 'sdpa'",
        "tokens": "must have this rank's 10 of 20 tokens, got 5 and 5",
        "split": "split must be one of ['zigzag', 'contiguous'] or a function, got 'fair'",
        "split leaves out": "split must assign all 20 tokens, got 19",
        "split twice": "each token once, got tokens 5 to 20 for rank 1 after the first 20",
        "split idle": "got none of 20 for [1] of 2 ranks",
    }.items():
        assert part in said[name], (name, said.get(name))


def test_copies_and_derivatives() -> None:
    for found in run_ranks("context_checks:copies_and_derivatives", 2):
        assert found["copied"]
        assert found["sent"] is None
        assert found["deprecated"] == []
        assert "differentiable once, in reverse mode" in found["twice"]


def test_different_inputs_are_refused_on_all_ranks() -> None:
    for said in run_ranks("context_checks:different_inputs", 2):
        assert said.pop("same") == "accepted"
        for name, message in said.items():
            what = "attention_mask" if "mask" in name else "tokens"
            assert f"must be given the same whole sequences, got different {what}: " in message, (name, message)


def test_single_process_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a process group, got a single process without one"):
        ContextParallel()


def test_heads_that_need_the_whole_sequence_are_refused() -> None:
    model = tiny_model(model_class=FoxForSequenceClassification)
    context: Any = SimpleNamespace(shards=None, check_same=None)
    with pytest.raises(ValueError, match="FoxForSequenceClassification needs the whole sequence"):
        model.set_context_parallel(context)
    with pytest.raises(ValueError, match="context must be a ContextParallel or None, got object"):
        model.set_context_parallel(object())
    model.set_context_parallel(None)


@pytest.mark.parametrize("name", NAMED_SPLITS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_splits_deal_out_every_token_once(name: str, ranks: int) -> None:
    for length in (ranks, 2 * ranks - 1, 2 * ranks, 1000, 4096, 131072):
        split = TokenSplit(length, ranks, NAMED_SPLITS[name](length, ranks))
        tokens = torch.cat([split.take(torch.arange(length), rank, dim=0) for rank in range(ranks)])
        assert torch.equal(tokens.sort().values, torch.arange(length))
        for rank in range(ranks):
            own = split.take(torch.arange(length), rank, dim=0)
            for segment, rows in zip(split.of(rank), split.rows(rank), strict=True):
                assert torch.equal(own[rows], torch.arange(segment.start, segment.stop))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_split_gives_every_rank_the_same_pairs(ranks: int) -> None:
    length = 2**17
    split = TokenSplit(length, ranks, zigzag(length, ranks))
    pairs = [sum(stop * (stop + 1) - start * (start + 1) for _, start, stop in split.of(r)) for r in range(ranks)]
    assert max(pairs) / min(pairs) < 1.001


def test_neighbours_on_one_rank_are_joined() -> None:
    split = TokenSplit(8, 2, [Segment(0, 6, 8), Segment(1, 2, 4), Segment(1, 4, 6), Segment(0, 0, 2), Segment(1, 2, 2)])
    assert split.segments == (Segment(0, 0, 2), Segment(1, 2, 6), Segment(0, 6, 8))


def test_share_of_traffic() -> None:
    traffic = CommunicationVolume(moved=30, ring=120)
    assert traffic.share == 0.25
    traffic.clear()
    assert traffic.share == 0.0
