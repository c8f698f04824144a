"""What ranks do in the tests of context parallelism: the same as one device, on each from the same seed."""

import copy
import pickle
import random
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from foxlm.kernels.attention import forgetting_attention
from foxlm.kernels.context_parallel import attention as sharded_attention
from foxlm.kernels.context_parallel.api import context_parallel_attention
from foxlm.kernels.context_parallel.group import ContextParallel
from foxlm.kernels.context_parallel.partition import Segment
from foxlm.kernels.context_parallel.sequence import ShardedSequence
from foxlm.kernels.decay import accumulate
from foxlm.modeling.versions import cache_of
from models import tiny_model


def random_split(length: int, ranks: int) -> list[Segment]:
    """Up to four segments for each rank, cut anywhere."""
    draw = random.Random(length)
    cuts = sorted(draw.sample(range(1, length), min(length - 1, draw.randint(ranks, 4 * ranks))))
    bounds = [0, *cuts, length]
    owners = [*range(ranks), *(draw.randrange(ranks) for _ in range(len(bounds) - 1 - ranks))]
    draw.shuffle(owners)
    return [Segment(*one) for one in zip(owners, bounds, bounds[1:], strict=False)]


def _case(seed: int, ranks: int, longest: int, head_dim: int) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """Inputs of the whole sequence, options, and how to split it."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = draw.choice([draw.randint(max(ranks, 2), 40), draw.randint(40, longest), longest // 256 * 256])
    batch, kv_heads = draw.choice([1, 1, 2]), draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2])
    gates = draw.choice([1, kv_heads, heads])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    inputs = {name: normal(batch, tokens, count, head_dim) for name, count in (("q", heads), ("k", kv_heads))}
    inputs = {name: torch.nn.functional.rms_norm(x, x.shape[-1:]) for name, x in inputs.items()}
    inputs["v"] = normal(batch, tokens, kv_heads, head_dim)
    # From heads that forget in a token to some that do not within the sequence.
    times = torch.exp(8.0 * torch.rand(gates, generator=generator))
    inputs["log_f"] = -torch.exp(0.5 * normal(batch, tokens, gates)) / times
    options: dict[str, Any] = {"eps": draw.choice([None, 1e-4]), "rule": draw.choice(["tight", "paper"])}
    split = draw.choice(["zigzag", "contiguous", random_split])
    if draw.random() < 0.5:
        resets = torch.rand(batch, tokens, gates, generator=generator) < 0.02
        if split == "zigzag":
            # On borders of segments too.
            resets[:, [0, tokens // (2 * ranks), tokens - tokens // (2 * ranks)]] = True
        inputs["log_f"] = inputs["log_f"].masked_fill(resets, float("-inf"))
    if batch == 1 and draw.random() < 0.5:
        cuts = sorted(draw.choices(range(tokens + 1), k=draw.randint(1, 6)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, tokens])
    elif draw.random() < 0.5:
        mask = torch.rand(batch, tokens, generator=generator) > 0.2
        mask[0, : draw.choice([0, tokens // 3])] = False
        options["attention_mask"] = mask
    return inputs, options, split


def attention_errors(
    seeds: Sequence[int], longest: int = 700, head_dim: int = 8, group: dist.ProcessGroup | None = None
) -> list[dict[str, Any]]:
    """Of each random case, the largest errors on this rank of output and gradients, and what was drawn.

    With a group of NCCL's on its GPUs, in bfloat16.
    """
    found = []
    for seed in seeds:
        inputs, options, split = _case(seed, dist.get_world_size(), longest, head_dim)
        if group is not None:
            inputs = {name: x.cuda() if name == "log_f" else x.cuda().bfloat16() for name, x in inputs.items()}
            options = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
        tokens = inputs["q"].shape[1]
        shards = (context := ContextParallel(group, split=split)).shards(tokens)
        whole: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        expected = forgetting_attention(**whole, **options)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(expected)
        (expected * weights).sum().backward()
        own: dict[str, Any] = {name: shards.take(x).clone().requires_grad_() for name, x in inputs.items()}
        # As of much to fetch, and of little.
        with mock.patch.object(sharded_attention, "_WORTH_HIDING", 0 if seed % 2 else 1 << 29):
            out = context_parallel_attention(**own, context=context, length=tokens, **options)
        (out * shards.take(weights)).sum().backward()

        errors = {"out": _error(expected, out, shards)}
        for name in inputs:
            errors[name] = _error(whole[name].grad, own[name].grad, shards)
        aligned = all(start % 128 == 0 for _, start, _ in shards.split.segments)
        found.append({"seed": seed, "errors": errors, "prunes_alike": aligned or options["eps"] is None})
    return found


def _error(whole: Tensor | None, own: Tensor | None, shards: Any) -> float:
    assert whole is not None and own is not None
    whole = whole.detach()
    return float((shards.take(whole) - own.detach()).abs().max() / whole.abs().max().clamp(min=1e-3))


def attention_errors_on_gpus(cases: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """As `attention_errors` on GPUs, by sizes of heads and seeds; a line is printed after each."""
    torch.cuda.set_device(dist.get_rank())
    group, found = dist.new_group(backend="nccl"), []
    for number, (head_dim, seed) in enumerate(cases, 1):
        start = time.perf_counter()
        found += attention_errors([seed], 3000, head_dim, group)
        took = time.perf_counter() - start
        print(
            f"{number}/{len(cases)}: heads of {head_dim}, seed {seed}, {took:.1f} s on rank {dist.get_rank()}",
            flush=True,
        )
    return found


def attention_errors_without_carry(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """As `attention_errors`, with gates that are summed for each rank alone: what the tests must notice."""

    def alone(self: Any, log_f: Tensor, starts: Tensor | None, backend: Any) -> tuple[Tensor, Tensor]:
        return accumulate(log_f, starts=starts)

    with mock.patch.object(ShardedSequence, "accumulate", alone):
        return attention_errors(seeds)


def dropout_is_the_same_backward() -> float:
    """Error of a directional derivative in the values, in which attention is linear for given dropped weights."""
    torch.manual_seed(dist.get_rank())
    context = ContextParallel()
    q, k, v, direction = (torch.randn(1, 150, 2, 8, dtype=torch.float64) for _ in range(4))
    log_f = -torch.rand(1, 150, 2, dtype=torch.float64) / 20

    def attend(values: Tensor) -> Tensor:
        torch.manual_seed(5)
        return context_parallel_attention(q, k, values, log_f, context=context, length=300, dropout=0.3).square().sum()

    v.requires_grad_()
    attend(v).backward()
    assert v.grad is not None
    # Other ranks' outputs depend on these values too: all move at once, and what is compared are the sums.
    step = 1e-4
    with torch.no_grad():
        change = (attend(v + step * direction) - attend(v - step * direction)) / (2 * step)
    expected, found = change, (v.grad * direction).sum()
    for x in (expected, found):
        dist.all_reduce(x)
    return float((expected - found).abs() / expected.abs())


def traffic_shares(tokens: int) -> dict[str, float]:
    """Bytes moved over those of ring attention, all ranks together, with gates that forget and without."""
    generator = torch.Generator().manual_seed(0)
    heads, size = 10, 64
    q, k, v = (torch.randn(1, tokens, heads, size, generator=generator) for _ in range(3))
    q, k = (torch.nn.functional.rms_norm(x, (size,)) for x in (q, k))
    # Eight heads forget in up to 20 tokens, two hardly.
    times = torch.tensor([1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 1e5, 1e6])
    shares = {}
    for name, log_f in (("forgets", -(1 / times).expand(1, tokens, heads)), ("never", torch.zeros(1, tokens, heads))):
        context = ContextParallel()
        own = [context.shards(tokens).take(x) for x in (q, k, v, log_f)]
        context_parallel_attention(*own, context=context, length=tokens, eps=2.0**-14)
        moved = torch.tensor([context.traffic.moved, context.traffic.ring], dtype=torch.float64)
        dist.all_reduce(moved)
        shares[name] = float(moved[0] / moved[1])
        assert 0.0 <= context.traffic.share < 1.1
    return shares


CALLS = ("whole", "padded", "packed", "packed by offsets", "items", "auxiliary loss", "checkpointing")


def model_errors(variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each variant and call, the largest errors of logits, loss and gradients against the whole model."""
    context = ContextParallel()
    return {
        f"{variant}, {call}": _model_errors(variant, call, context)
        for variant in variants
        for call in CALLS
        if not (call == "auxiliary loss" and variant == "fixed")
    }


def _model_errors(variant: str, call: str, context: ContextParallel) -> dict[str, float]:
    torch.manual_seed(1)
    tokens = 61
    ids = torch.randint(2, 97, (1 if call.startswith("packed") else 2, tokens))
    labels = ids.masked_fill(torch.arange(tokens) < 5, -100)
    inputs: dict[str, Any] = {}
    if call == "padded":
        mask = torch.rand(2, tokens) > 0.2
        mask[0, :20] = False
        inputs["attention_mask"] = mask.long()
    if call == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in (7, 30, 1, 23)])[None]
    if call == "packed by offsets":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 7, 37, 38, 61])
    if call in ("items", "auxiliary loss"):
        inputs["num_items_in_batch"] = torch.tensor(50)
    coefficient = 0.5 if call == "auxiliary loss" else 0.0
    # Without pruning, which on a CPU only context parallelism does.
    model = tiny_model(variant, forget_aux_loss_coef=coefficient, acp_eps=None).train()
    if call == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = model(ids, labels=labels, use_cache=False, **inputs)
    expected.loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad(set_to_none=True)

    model.set_context_parallel(context)
    found = model(ids, labels=labels, **inputs)
    found.loss.backward()
    # What each rank returns of a loss that is given its number of items is an equal share.
    factor = context.ranks if "num_items_in_batch" in inputs else 1
    worst = 0.0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            off = parameter.grad * (factor / context.ranks) - gradients[name]
            worst = max(worst, float(off.abs().max() / gradients[name].abs().max().clamp(min=1e-3)))
    own = context.shards(tokens).take(expected.logits)
    return {
        "logits": float((own - found.logits).abs().max() / own.abs().max()),
        "loss": abs(float(expected.loss) - factor * float(found.loss)) / float(expected.loss),
        "gradients": worst,
    }


def refusals() -> dict[str, str]:
    """The messages of what a context-parallel model or group refuses."""
    context = ContextParallel()
    ids = torch.randint(2, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    model.set_context_parallel(context)
    x = torch.zeros(1, 5, 1, 4)
    said = {}
    for name, call in {
        "generate": lambda: model.generate(ids, max_new_tokens=2),
        "cache": lambda: model(ids, cache=cache_of(tiny_model()(ids, use_cache=True))),
        "logits_to_keep": lambda: model(ids, logits_to_keep=1),
        "short": lambda: model(ids[:, :1]),
        "sdpa": lambda: _with_implementation(model, "sdpa")(ids),
        "tokens": lambda: context_parallel_attention(x, x, x, torch.zeros(1, 5, 1), context=context, length=20),
        "split": lambda: ContextParallel(split="fair"),
        "split leaves out": lambda: ContextParallel(split=lambda n, ranks: [Segment(0, 0, n - 1)]).shards(20),
        "split twice": lambda: ContextParallel(split=lambda n, r: [Segment(0, 0, n), Segment(1, 5, n)]).shards(20),
        "split idle": lambda: ContextParallel(split=lambda n, ranks: [Segment(0, 0, n)]).shards(20),
    }.items():
        said[name] = _refusal(call)
    return said


def copies_and_derivatives() -> dict[str, Any]:
    """Which group copies of a model are of, what is said of second derivatives, and of what torch warns."""
    ids = torch.randint(2, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    model.set_context_parallel(context := ContextParallel())
    found: dict[str, Any] = {
        "copied": copy.deepcopy(model).model.context_parallel is context,
        "sent": pickle.loads(pickle.dumps(model)).model.context_parallel,
    }
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model(ids, labels=ids).loss.backward()
    found["deprecated"] = [str(each.message) for each in warned if "deprecated" in str(each.message)]
    try:
        torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), create_graph=True)
    except NotImplementedError as error:
        found["twice"] = str(error)
    return found


def different_inputs() -> dict[str, str]:
    """What each rank says of inputs that are not those of the others."""
    model, rank = tiny_model(), dist.get_rank()
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : 5 + rank] = 0
    own = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(rank))
    said = {}
    cases: dict[str, dict[str, Any]] = {
        "same": {"input_ids": ids},
        "rows": {"input_ids": own},
        "order": {"input_ids": ids.roll(rank, 1)},
        "batch": {"input_ids": ids[: 1 + rank]},
        "length": {"input_ids": ids[:, : 30 + rank]},
        "mask": {"input_ids": ids, "attention_mask": mask},
        "only one masked": {"input_ids": ids, "attention_mask": None if rank else mask},
        "embeddings": {"inputs_embeds": model.model.embed_tokens(own)[:, rank:]},
    }
    for name, arguments in cases.items():
        model.set_context_parallel(ContextParallel())
        said[name] = _refusal(partial(model, **arguments))
    return said


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def _with_implementation(model: Any, name: str) -> Any:
    model.set_attn_implementation(name)
    return model
