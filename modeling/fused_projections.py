"""Weights as decoding wants them: one product where projections have the same input, and no sharded tensors.

A step of decoding multiplies a few rows by every weight, so what counts are launches, and how well each reads its
weight: six projections of an attention layer's input are six small products, some of a dozen rows. And under tensor
parallelism each sharded weight (`DTensor`) costs the host as much time as a small kernel takes.

`FoxForCausalLM.generate` enters `decoding_weights`. Parameters stay what they are: their memory becomes rows of a
larger tensor that only the layers see, and only within the context, so that nothing outside can be out of date.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as _module
from torch.utils.dlpack import from_dlpack, to_dlpack

from .parallel.tensor_parallel import held_tensor, hold, is_sharded

# Of a call in which projections are one product: its parts are strided, which longer calls would have to copy.
FEW_TOKENS = 64
# Bytes; kernels read weights in pieces so long, and want them to begin at a multiple.
_ALIGNMENT = 16


class FusedProjections(NamedTuple):
    """Projections of one input as one product. Each of them is still there, its weight some of these rows.

    Attributes:
        names: of the projections, as their owner's submodules.
        sizes: rows of each.
        weight: ``[sum of sizes, in]``.
        bias: ``[sum of sizes]``, zero for a projection without; None if all are.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    # A Parameter, so that torch.compile takes its address for fixed.
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __reduce__(self) -> tuple:
        # The copy of a model has weights of its own.
        return type(None), ()


def fused_products(owner: Any, x: Tensor) -> dict[str, Tensor]:
    """``x`` through each of the owner's fused projections; empty where they are to be called one by one.

    Args:
        owner: a module with ``fused_projections``, its `FusedProjections` or None.
        x: ``[..., in]``.

    Returns:
        ``[..., size]`` by name: views of one tensor.
    """
    fused: FusedProjections | None = owner.fused_projections
    if fused is None or torch.is_grad_enabled() or x.shape[:-1].numel() > FEW_TOKENS:
        return {}
    # Hooks that offload move a model when it is called, which is within the context.
    if fused.weight.device != x.device:
        return {}
    products = nn.functional.linear(x, fused.weight, fused.bias).split(fused.sizes, dim=-1)
    return dict(zip(fused.names, products, strict=True))


# What a module's projections were last joined in. No more than that: a model that was moved must not hold the memory.
_JOINED: "weakref.WeakKeyDictionary[nn.Module, dict[str, StorageWeakRef]]" = weakref.WeakKeyDictionary()
_ENTERING = threading.Lock()


@contextlib.contextmanager
def decoding_weights(model: nn.Module) -> Iterator[None]:
    """Within it, calls of up to 64 tokens without gradients run faster; `FoxForCausalLM.generate` enters it by itself.

    For loops of your own. Projections of one input run as one product. The weights of a tensor-parallel model
    (`DistributedConfig(tp_size=)`) are this rank's plain tensors, and small sums over ranks go through memory that the
    GPUs of one host share; all ranks must enter together.

    The first entry moves weights within the device's memory, a layer at a time. Parameters remain the same objects with
    the same names and values, before, within and after. A layer is left as it is where a projection is more than a
    matrix (LoRA, quantized), has hooks, is on another device or is shared, under FSDP and under autocast; and where
    other tensors have its memory, such as those of a ``state_dict()`` that somebody keeps. CUDA graphs of your own,
    captured before the first entry, are to be captured again.

    Within the context do not train, save, move or replace weights, or add hooks to projections.

    Args:
        model: a FoX model, or a module that has one; others are left as they are.

    Example:
        >>> model = FoxForCausalLM(FoxConfig.preset("pro-125m", num_hidden_layers=2)).eval()
        >>> cache = FoxPagedCache(model.config, max_cache_len=4096)
        >>> with torch.no_grad(), decoding_weights(model):
        ...     for ids in torch.tensor([[1, 2, 3]]), torch.tensor([[4]]):
        ...         logits = model(ids, cache=cache).logits
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module of torch, got {type(model).__name__}")
    with contextlib.ExitStack() as undo:
        with _ENTERING, torch.inference_mode(False), torch.no_grad():
            _enter(model, undo.callback)
        yield


def _enter(model: nn.Module, on_exit: Callable[..., Any]) -> None:
    modules: list[Any] = list(model.modules())
    # FSDP's sharded weights are whole only while their layer runs.
    if any(hasattr(type(module), "unshard") for module in modules):
        return
    taken: set[int] = set()
    for module in modules:
        # Set already by an entry around this one, which will also end it.
        if hasattr(type(module), "projections") and module.fused_projections is None:
            on_exit(module.__dict__.pop, "fused_projections", None)
            # Where a layer more does not fit, it stays as it is.
            with contextlib.suppress(torch.OutOfMemoryError):
                module.fused_projections = _fuse(module, taken)
    for module in modules:
        # As transformers marks what its tensor parallelism calls. The embedding sums looked-up parts as they are.
        if "_is_hooked" in module.__dict__ and not isinstance(module, nn.Embedding):
            _use_held_tensors(module, on_exit)


def _use_held_tensors(module: Any, on_exit: Callable[..., Any]) -> None:
    for name, weight in list(module._parameters.items()):
        if not is_sharded(weight):
            continue
        if hasattr(module, "sums_through") and name == "weight":
            from .parallel.small_sums import share_memory

            module.sums_through = share_memory(weight)
            on_exit(setattr, module, "sums_through", None)
        part = nn.Parameter(held_tensor(weight), requires_grad=False)
        module._parameters[name] = part
        on_exit(_restore, module, name, part, weight)


def _restore(module: nn.Module, name: str, part: nn.Parameter, weight: nn.Parameter) -> None:
    # Unless somebody has put another weight there.
    if module._parameters.get(name) is part:
        module._parameters[name] = weight


def _fuse(owner: Any, taken: set[int]) -> FusedProjections | None:
    """The owner's projections joined, or None where they cannot be. ``taken`` are the weights of others."""
    names = tuple(name for name in owner.projections if _submodule(owner, name) is not None)
    linears = [_submodule(owner, name) for name in names]
    if not all(_is_product(linear) for linear in linears):
        return None
    sharded = {is_sharded(linear.weight) for linear in linears}
    if len(sharded) > 1 or (True in sharded and not owner.outputs_stay_sharded):
        return None
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    given = {id(x) for x in (*weights, *biases) if x is not None}
    # Part of a larger memory, which an engine may train or send as one. Of a sharded weight it is what was loaded.
    owned = True in sharded or all(_owns_its_memory(x) for x in (*weights, *biases) if x is not None)
    if not owned or given & taken or not _can_be_joined(weights, biases):
        return None
    taken |= given
    sizes = tuple(len(held_tensor(weight)) for weight in weights)
    kept = _JOINED.setdefault(owner, {})
    weight = _join(weights, sizes, kept, "weight")
    has_bias = any(bias is not None for bias in biases)
    bias = _join(biases, sizes, kept, "bias") if has_bias else None
    if weight is None or (bias is None and has_bias):
        return None
    fixed_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return FusedProjections(names, sizes, nn.Parameter(weight, requires_grad=False), fixed_bias)


def _submodule(owner: nn.Module, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part, None)  # type: ignore[assignment]
    return owner


def _is_product(linear: Any) -> bool:
    """Whether calling a module does nothing but to multiply by its weight, and nobody watches."""
    if type(linear) is not nn.Linear or "_hf_hook" in linear.__dict__:
        return False
    watched = (linear._forward_hooks, linear._forward_pre_hooks, _module._global_forward_hooks)
    if any(watched) or _module._global_forward_pre_hooks:
        return False
    forward = linear.__dict__.get("forward")
    if forward is not None and not _is_of_tensor_parallelism(forward):
        return False
    return all(is_sharded(x) or type(x) is nn.Parameter for x in linear._parameters.values() if x is not None)


def _is_of_tensor_parallelism(forward: Any) -> bool:
    """Whether transformers put it there; with a plain weight and no gradient that changes nothing."""
    return isinstance(forward, FunctionType) and forward.__qualname__.startswith("TensorParallelLayer.install_forward.")


def _owns_its_memory(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.nbytes


def _has_other_views(x: Tensor) -> bool:
    """Whether another tensor has its memory: it would no longer see what is written to ``x`` after a move."""
    return not is_sharded(x) and _uses(x) > _uses(nn.Parameter(torch.empty(1)))


def _uses(x: Tensor) -> int:
    """How many have the memory of ``x``; among them what is made to look, whatever that is in this release of torch."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _can_be_joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    tensors = [held_tensor(x) for x in weights]
    first, vectors = tensors[0], [held_tensor(x) for x in biases if x is not None]
    if not (first.is_floating_point() and first.device.type in ("cpu", "cuda") and len(tensors) > 1):
        return False
    # Its weights are cast once per autocast context; a joined one would be, once per call.
    if torch.is_autocast_enabled(first.device.type):
        return False
    alike = all(x.dtype == first.dtype and x.device == first.device and x.is_contiguous() for x in tensors + vectors)
    if not alike or any(x.ndim != 2 or x.shape[1] != first.shape[1] for x in tensors):
        return False
    # With another process: all memory of a GPU says so.
    shared = first.device.type == "cpu" and any(x.is_shared() for x in tensors + vectors)
    # Biases come first, if only some projections have one.
    aligned = all(x.nbytes % _ALIGNMENT == 0 for x in (*tensors[:-1], *vectors[:-1]))
    return aligned and not shared


def _join(
    weights: Sequence[Tensor | None], sizes: tuple[int, ...], kept: dict[str, StorageWeakRef], kind: str
) -> Tensor | None:
    """One tensor with ``weights`` as rows, zero for None, whose memory becomes theirs; the last one if it still is.

    None where memory would have to be moved that other tensors have too.
    """
    parts = [None if weight is None else held_tensor(weight) for weight in weights]
    first = next(part for part in parts if part is not None)
    shape = torch.Size((sum(sizes), *first.shape[1:]))
    storage = torch.UntypedStorage._new_with_weak_ptr(kept[kind].cdata) if kind in kept else None
    if storage is not None and storage.nbytes() == shape.numel() * first.itemsize and storage.device == first.device:
        whole = torch.empty(0, dtype=first.dtype, device=first.device).set_(storage).view(shape)
        places = zip(parts, whole.split(sizes), strict=True)
        if all(part is None or part.data_ptr() == rows.data_ptr() for part, rows in places):
            return whole
    if any(weight is not None and _has_other_views(weight) for weight in weights):
        return None
    whole = torch.zeros(shape, dtype=first.dtype, device=first.device)
    for weight, part, rows in zip(weights, parts, whole.split(sizes), strict=True):
        if weight is not None and part is not None:
            rows.copy_(part)
            # The same memory as a storage of its own: what saves weights drops all but one of those that share one.
            hold(weight, from_dlpack(to_dlpack(rows)))
    kept[kind] = StorageWeakRef(whole.untyped_storage())
    return whole
