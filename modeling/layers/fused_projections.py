"""Fused projections: linear layers with the same input, computed as one matmul without gradients.

A step of decoding multiplies a few rows by every weight, so its time is launches and how well each launch reads its
weight: the six projections of an attention layer's input are six small matmuls, some with a dozen rows of output.

`FusableProjections.fuse_projections` copies their weights into one contiguous buffer and makes each parameter's memory
rows of it, as ``torch.nn.RNNBase.flatten_parameters`` does for cuDNN. Parameters remain the same objects with the same
names and values, so checkpoints, optimizers and adapters see no difference, and no weight is held twice.
"""

import contextlib
import itertools
import threading
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ...kernels.operators import may_launch
from ..parallel.tensor_parallel import is_sharded, local_tensor, modules_of, set_local_tensor, shards_layers
from .saved_activations import cast_once

# Tokens of a call that is fused at most: its outputs are strided views, which longer calls would have to copy.
MAX_FUSED_TOKENS = 64
# And where kernels read such views: so many tokens keep a GPU busy for longer than the host needs for a layer, and with
# more the outputs, which are kept until the last of them is read, would be a weight on memory.
MAX_FUSED_PROMPT = 8192
# Bytes that the address of each weight is a multiple of: kernels read weights in vectors of this size.
_ALIGNMENT = 16
# Of these the buffer has a multiple: see `FusedProjections.weight`.
_ROW_MULTIPLE = 16
# Two threads that generate with one model must not move its weights at the same time.
_LOCK = threading.Lock()


class FusedProjections(NamedTuple):
    """The buffer of a module's projections, whose weights are its rows.

    Attributes:
        names: of the projections, as submodules of their owner.
        sizes: output features of each.
        addresses: of each one's weight and bias, None without a bias.
        weight: ``[sum of sizes, in]``, and rows of zeros up to a multiple of 16: kernels that read the outputs are
            compiled for strides that are a multiple of it, and once more for others.
        bias: of each row, zero for a projection without a bias; None if none has one.
        modules: each one on the way to a projection, with the dictionary and the name that it was found by.
        linears: the projections, with the weight and bias of each.
        on_kernels: whether kernels read what is projected.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    addresses: tuple[tuple[int | None, ...], ...]
    # Parameters, whose addresses torch.compile takes for fixed.
    weight: nn.Parameter
    bias: nn.Parameter | None
    modules: tuple[tuple[dict[str, Any], str, nn.Module], ...] = ()
    linears: tuple[tuple[nn.Linear, nn.Parameter, nn.Parameter | None], ...] = ()
    on_kernels: bool = False

    def __reduce__(self) -> tuple:
        # A copy of the model has weights of its own: None in its place.
        return type(None), ()


class FusableProjections(nn.Module):
    """A module that calls several linear layers on one input.

    Attributes:
        projections: names of those layers, as submodules; those that a configuration leaves out may be missing.
        outputs_stay_sharded: whether under tensor parallelism each rank goes on with its own part of their outputs.
        reads_views: whether on a GPU kernels read the outputs as they are, and nothing keeps them for later.
        fused_projections: their buffer, or None.
        uses_fused: when calls read the buffer; ``checked`` is where the projections still are what was fused, and
            ``always`` for a caller that has made sure of it.
    """

    projections: ClassVar[tuple[str, ...]]
    outputs_stay_sharded: Any = True
    reads_views: bool = True
    fused_projections: FusedProjections | None = None
    uses_fused: Literal["never", "checked", "always"] = "never"

    def fuse_projections(self) -> None:
        """`FoxForCausalLM.fuse_projections` for this module alone."""
        fuse_projections(self)

    def unfuse_projections(self) -> None:
        """Undo `fuse_projections`: give each weight memory of its own again, at a new address."""
        fused, self.fused_projections, self.uses_fused = self.fused_projections, None, "never"
        if fused is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            for name, addresses in zip(fused.names, fused.addresses, strict=True):
                for parameter, address in zip(_parameters(_submodule(self, name)), addresses, strict=True):
                    if parameter is not None and _address(parameter) == address:
                        set_local_tensor(parameter, local_tensor(parameter).clone())

    def project(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs of the projections, computed as one matmul; or, in training under autocast, of one cast.

        Args:
            x: ``[..., in]``.

        Returns:
            ``[..., size]`` by name; empty where the projections are to be called one by one.
        """
        if torch.is_grad_enabled():
            return self._project_one_cast(x)
        fused = self.buffer_for(x)
        if fused is None:
            return {}
        if x.ndim == 3 and x.shape[0] == x.shape[1] == 1 and not torch.compiler.is_compiling():
            # Imported when they are used, since importing the kernels takes time.
            from ...kernels.backends import elementwise_backend_of

            outputs = elementwise_backend_of(x).linear(x, fused.weight, fused.bias)
        else:
            outputs = nn.functional.linear(x, fused.weight, fused.bias)
        rest = outputs.shape[-1] - sum(fused.sizes)
        # The rows of zeros are left out by zip.
        return dict(zip(fused.names, outputs.split_with_sizes((*fused.sizes, rest), dim=-1), strict=False))

    def buffer_for(self, x: Tensor) -> FusedProjections | None:
        """The buffer that a call without gradients reads for ``x``, ``[..., in]``; None where it reads none."""
        fused = self.fused_projections
        if fused is None or self.uses_fused == "never":
            return None
        tokens = x.shape[:-1].numel()
        if tokens > MAX_FUSED_TOKENS:
            reads_views = fused.on_kernels and self.reads_views and not torch.compiler.is_compiling()
            if tokens > MAX_FUSED_PROMPT or not reads_views:
                return None
        # accelerate moves an offloaded model when it is called; autocast would cast the whole buffer at each call.
        if fused.weight.device != x.device or _autocasts(x):
            return None
        checks = self.uses_fused == "checked" and not torch.compiler.is_compiling()
        if checks and not (self._is_untouched(fused) or self._is_fused()):
            if not self._holds_weights():
                # The buffer would be memory that nothing reads.
                self.unfuse_projections()
            return None
        return fused

    def _project_one_cast(self, x: Tensor) -> dict[str, Tensor]:
        if torch.compiler.is_compiling() or x.dtype != torch.float32 or not _autocasts(x) or not may_launch(x):
            return {}
        linears = {name: _submodule(self, name) for name in self.projections}
        linears = {name: linear for name, linear in linears.items() if linear is not None}
        if not all(is_called_as_matmul(linear) for linear in linears.values()):
            return {}
        casts = cast_once(x, torch.get_autocast_dtype(x.device.type), len(linears))
        return {name: linear(cast) for (name, linear), cast in zip(linears.items(), casts, strict=True)}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # The weights have moved, unless `to` was asked for what they are already.
        if not self._is_fused():
            self.unfuse_projections()
        return self

    def train(self, mode: bool = True) -> Any:
        if mode:
            # An engine that shards or offloads what it trains could not free weights that the buffer holds too.
            self.unfuse_projections()
        return super().train(mode)

    @staticmethod
    def _is_untouched(fused: FusedProjections) -> bool:
        """As `_is_fused`, for an eighth of its time. False also means that it has to be asked."""
        if _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return False
        for modules, name, module in fused.modules:
            if name not in modules or modules[name] is not module:
                return False
        for (linear, weight, bias), addresses in zip(fused.linears, fused.addresses, strict=True):
            state = linear.__dict__
            parameters = state["_parameters"]
            if type(linear) is not nn.Linear or "forward" in state or "_hf_hook" in state:
                return False
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or len(parameters) != 2:
                return False
            if parameters["weight"] is not weight or type(weight) is not nn.Parameter or parameters["bias"] is not bias:
                return False
            if weight.data_ptr() != addresses[0] or (bias is not None and bias.data_ptr() != addresses[1]):
                return False
        return True

    def _is_fused(self) -> bool:
        """Whether each projection still is a plain linear layer whose weights are rows of the buffer."""
        fused = self.fused_projections
        if fused is None or not self._holds_weights():
            return False
        return all(_is_matmul(_submodule(self, name)) for name in fused.names)

    def _holds_weights(self) -> bool:
        """Whether the weights of all projections are rows of the buffer."""
        fused = self.fused_projections
        if fused is None:
            return False
        found = (tuple(map(_address, _parameters(_submodule(self, name)))) for name in fused.names)
        return all(x == addresses for x, addresses in zip(found, fused.addresses, strict=True))

    def _fuse(self, taken: set[int | None]) -> bool:
        """Make the projections rows of one buffer, where they are not yet and can be.

        Args:
            taken: addresses of weights that other modules have fused; those of this one are added.

        Returns:
            Whether they are.
        """
        fused = self.fused_projections
        if fused is not None and self._is_untouched(fused):
            taken.update(address for addresses in fused.addresses for address in addresses)
            return True
        names = tuple(name for name in self.projections if _submodule(self, name) is not None)
        linears = [_submodule(self, name) for name in names]
        fits = all(_is_matmul(x) for x in linears) and _fit_one_buffer(linears)
        parallel = {_is_tensor_parallel(x) for x in linears}
        gathers = True in parallel and not self.outputs_stay_sharded
        weights = [x for linear in linears for x in _parameters(linear) if x is not None] if fits else []
        if not fits or len(parallel) > 1 or gathers or taken & set(map(_address, weights)):
            self.unfuse_projections()
            return False
        if not self._is_fused():
            self.unfuse_projections()
            # Parts of a larger memory may be trained or sent as one by an engine; shards are parts of what was loaded.
            if not all(is_sharded(x) or x.untyped_storage().nbytes() == x.nbytes for x in weights):
                return False
            with torch.inference_mode(False), torch.no_grad():
                fused = _move_to_buffer(names, linears)
            # Imported when they are used, since importing the kernels takes time.
            from ...kernels.backends import PYTORCH, elementwise_backend_of

            kept = tuple((x, *_parameters(x)) for x in linears)
            on_kernels = elementwise_backend_of(fused.weight) is not PYTORCH
            self.fused_projections = fused._replace(modules=_ways(self, names), linears=kept, on_kernels=on_kernels)
        taken.update(map(_address, weights))
        return True


def fuse_projections(
    model: nn.Module, uses: Literal["checked", "always"] = "checked"
) -> list[tuple[FusableProjections, Literal["never", "checked", "always"]]]:
    """Fuse the projections of each module of ``model`` that has some, where they can be.

    Returns:
        The modules whose `uses_fused` became ``uses``, with what it was.
    """
    changed = []
    modules = modules_of(model)
    if shards_layers(modules):
        return []
    with _LOCK:
        taken: set[int | None] = set()
        for module in modules:
            if not isinstance(module, FusableProjections):
                continue
            before = "never" if module.fused_projections is None else module.uses_fused
            # Where there is no memory for one more buffer, the module stays as it is.
            with contextlib.suppress(torch.OutOfMemoryError):
                if module._fuse(taken) and before not in (uses, "always"):
                    module.uses_fused = uses
                    changed.append((module, before))
    return changed


def _submodule(owner: Any, name: str) -> Any:
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def _ways(owner: Any, names: tuple[str, ...]) -> tuple[tuple[dict[str, Any], str, nn.Module], ...]:
    """`FusedProjections.modules`."""
    ways = []
    for name in names:
        above = owner
        for part in name.split("."):
            ways.append((above._modules, part, above._modules[part]))
            above = above._modules[part]
    return tuple(ways)


def _parameters(linear: Any) -> tuple[Any, Any]:
    """Weight and bias; None where a module that was put in place of a linear layer has none."""
    return getattr(linear, "weight", None), getattr(linear, "bias", None)


def _address(parameter: Tensor | None) -> int | None:
    return None if parameter is None else local_tensor(parameter).data_ptr()


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def is_plain_linear(module: Any) -> bool:
    """Whether ``module`` is a linear layer of plain or sharded parameters: no adapter, quantizer, parametrization."""
    if type(module) is not nn.Linear:
        return False
    return all(x is None or is_sharded(x) or type(x) is nn.Parameter for x in _parameters(module))


def have_plain_forwards(modules: list[Any], made: type[nn.Module]) -> bool:
    """Whether calling each of them does what ``forward`` of its class ``made`` does, and nothing else."""
    for module in modules:
        if type(module) is not made or "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
            return False
        if module._backward_hooks or module._backward_pre_hooks or has_hooks(module):
            return False
    return True


def _is_matmul(module: Any) -> bool:
    """Whether calling ``module`` does nothing but multiply by its weight and add its bias."""
    if not is_plain_linear(module) or "_hf_hook" in module.__dict__:
        return False
    if "forward" in module.__dict__ and not _is_tensor_parallel(module):
        return False
    return not has_hooks(module)


def is_called_as_matmul(module: Any) -> bool:
    """Whether calling ``module`` does nothing but multiply by its whole weight and add its bias."""
    return _is_matmul(module) and "forward" not in module.__dict__


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` of ``[B, T, in]``; of one token, without gradients, by `Backend.linear`, if it is but a matmul."""
    # Not asked of what is traced, which serves any sizes.
    if torch.compiler.is_compiling() or x.shape[:-1] != (1, 1) or torch.is_grad_enabled():
        return module(x)
    if not is_called_as_matmul(module) or is_sharded(module.weight):
        return module(x)
    # Imported when they are used, since importing the kernels takes time.
    from ...kernels.backends import elementwise_backend_of

    return elementwise_backend_of(x).linear(x, module.weight, module.bias)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees or changes what ``module`` takes or returns."""
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or _module._global_forward_hooks or _module._global_forward_pre_hooks)


def _is_tensor_parallel(module: Any) -> bool:
    """Whether transformers' tensor parallelism set ``forward``; without gradients it multiplies by this rank's part."""
    return "forward" in module.__dict__ and getattr(module, "_is_hooked", False)


def _fit_one_buffer(linears: list[nn.Linear]) -> bool:
    weights = [local_tensor(x.weight) for x in linears]
    tensors = weights + [local_tensor(x.bias) for x in linears if x.bias is not None]
    first = weights[0]
    if not first.is_floating_point() or first.device.type not in ("cpu", "cuda") or len(weights) == 1:
        return False
    if any(x.dtype != first.dtype or x.device != first.device or not x.is_contiguous() for x in tensors):
        return False
    if any(x.ndim != 2 or x.shape[1] != first.shape[1] for x in weights):
        return False
    # On a GPU `is_shared` is true of all memory.
    if first.device.type == "cpu" and any(x.is_shared() for x in tensors):
        return False
    starts = itertools.accumulate((len(x) for x in weights[:-1]), initial=0)
    parts = [
        (start, local_tensor(x)) for start, linear in zip(starts, linears, strict=True) for x in linear.parameters()
    ]
    return all(start * part[0].nbytes % _ALIGNMENT == 0 for start, part in parts)


def _move_to_buffer(names: tuple[str, ...], linears: list[nn.Linear]) -> FusedProjections:
    """Copy weights and biases into new buffers, whose rows become their memory."""
    first = local_tensor(linears[0].weight)
    sizes = tuple(len(local_tensor(x.weight)) for x in linears)
    outputs = -(-sum(sizes) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    weight = first.new_zeros(outputs, first.shape[1])
    bias = None if all(x.bias is None for x in linears) else first.new_zeros(outputs)
    for name, buffer in (("weight", weight), ("bias", bias)):
        if buffer is None:
            continue
        for linear, rows in zip(linears, buffer[: sum(sizes)].split(sizes), strict=True):
            parameter = getattr(linear, name)
            if parameter is not None:
                rows.copy_(local_tensor(parameter))
                # The same memory as a storage of its own: savers drop all but one of the weights that share a storage.
                set_local_tensor(parameter, torch.from_dlpack(rows))
    addresses = tuple(tuple(map(_address, _parameters(x))) for x in linears)
    fixed = nn.Parameter(weight, requires_grad=False), None if bias is None else nn.Parameter(bias, requires_grad=False)
    return FusedProjections(names, sizes, addresses, *fixed)
