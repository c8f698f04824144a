"""How long a training step takes on more GPUs than were measured: computing, and bytes over measured bandwidths.

The model is plain on purpose, so that a reader can redo it by hand: what is sent while others compute is hidden as far
as there is computing to hide it behind, the rest adds up, and no GPU is slower than another. Its error is known where
it predicts what was measured too. It knows nothing of latencies, which weigh on small models on many GPUs, nor of what
sending costs the kernels beside it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Of what FSDP2 sends: weights as they compute, gradients as they are summed up.
WEIGHT_BYTES, GRADIENT_BYTES = 2, 4


@dataclass(frozen=True)
class Transfer:
    """Something sent in a step.

    Attributes:
        name: what it is.
        bytes: that one GPU must receive.
        bandwidth: at which it does, bytes per second.
        overlappable: whether there is computing that does not wait for it.
    """

    name: str
    bytes: float
    bandwidth: float
    overlappable: bool

    @property
    def seconds(self) -> float:
        """Of the transfer by itself."""
        return self.bytes / self.bandwidth


def step_seconds(compute: float, transfers: Sequence[Transfer]) -> float:
    """Seconds of a step that computes for ``compute`` seconds: ``max(compute, what overlaps) + what does not``."""
    overlapping = sum(one.seconds for one in transfers if one.overlappable)
    return max(compute, overlapping) + sum(one.seconds for one in transfers if not one.overlappable)


@dataclass(frozen=True)
class Network:
    """What connects the GPUs.

    Attributes:
        all_gather, reduce_scatter: bytes per second that one GPU receives within a host, measured.
        host_gpus: GPUs of a host.
        host_bandwidth: bytes per second that a host can take in from the others, all its network cards together.
    """

    all_gather: float
    reduce_scatter: float
    host_gpus: int = 8
    host_bandwidth: float = 400e9

    def hosts(self, gpus: int) -> int:
        """Hosts that so many GPUs fill."""
        return math.ceil(gpus / self.host_gpus)

    def effective(self, within: float, gpus: int) -> float:
        """Bytes per second that each of ``gpus`` receives, of a collective that reaches ``within`` inside a host.

        Everything enters each host once, ``(h - 1) / h`` of it from other hosts, and each GPU once, ``(N - 1) / N`` of
        it from other GPUs; the slower of the two ways sets the pace.
        """
        hosts = self.hosts(gpus)
        received = (gpus - 1) / gpus
        return received / max(received / within, (hosts - 1) / hosts / self.host_bandwidth) if gpus > 1 else within


@dataclass(frozen=True)
class ShardedModel:
    """Parameters as FSDP2 groups them.

    Attributes:
        layers: decoder layers, each a group.
        layer: parameters of one.
        embedding: of the input embedding.
        head: of the last norm and the output embedding, which stay whole from the forward to the backward pass.
    """

    layers: int
    layer: int
    embedding: int
    head: int

    def transfers(self, network: Network, gpus: int) -> list[Transfer]:
        """What FSDP2 sends in a step: weights are gathered for forward and again for backward, gradients scattered.

        Nothing hides the first gathering, of the embedding and the first layer, and the last scattering, that of the
        embedding's gradient.
        """
        received = (gpus - 1) / gpus
        gather = network.effective(network.all_gather, gpus)
        scatter = network.effective(network.reduce_scatter, gpus)
        first = self.embedding + self.layer
        gathered = 2 * (self.layers * self.layer + self.embedding) + self.head - first
        scattered = self.layers * self.layer + self.head
        return [
            Transfer("gather the first weights", WEIGHT_BYTES * first * received, gather, False),
            Transfer("gather the other weights", WEIGHT_BYTES * gathered * received, gather, True),
            Transfer("scatter gradients", GRADIENT_BYTES * scattered * received, scatter, True),
            Transfer("scatter the last gradients", GRADIENT_BYTES * self.embedding * received, scatter, False),
        ]


@dataclass(frozen=True)
class StepModel:
    """What is known of a step on one GPU.

    Attributes:
        compute: seconds of forward and backward.
        optimizer: seconds of the optimizer over all weights, which the GPUs share.
        tokens: of each GPU.
        model: what is sent.
        network: over what.
        calibrated_on: GPUs of the step that ``compute`` was worked out from, if it was no step on one GPU.
    """

    compute: float
    optimizer: float
    tokens: int
    model: ShardedModel
    network: Network
    calibrated_on: int | None = field(default=None)

    @classmethod
    def calibrated(
        cls, step: float, optimizer: float, gpus: int, tokens: int, model: ShardedModel, network: Network
    ) -> "StepModel":
        """From a step measured on ``gpus`` alone, for a model that fits on no single one.

        Args:
            step: seconds of a step.
            optimizer: of them, those of the optimizer over its share of the weights.
            gpus: measured.
            tokens, model, network: as of the class.
        """
        exposed = sum(one.seconds for one in model.transfers(network, gpus) if not one.overlappable)
        return cls(step - optimizer - exposed, optimizer * gpus, tokens, model, network, gpus)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "StepModel":
        """From what `facts` gave."""
        parts = {"model": ShardedModel(**facts["model"]), "network": Network(**facts["network"])}
        return cls(**{**facts, **parts})

    def predict(self, gpus: int) -> dict[str, Any]:
        """A step on ``gpus``.

        Returns:
            ``gpus``, ``hosts``, ``step_ms``, ``tokens_per_second`` (of all), ``efficiency`` (over ``gpus`` times one),
            ``waits_for`` (``compute`` or ``network``), ``hidden_ms`` and ``exposed_ms`` of sending.
        """
        transfers = self.model.transfers(self.network, gpus) if gpus > 1 else []
        compute = self.compute + self.optimizer / gpus
        seconds = step_seconds(compute, transfers)
        hidden = sum(one.seconds for one in transfers if one.overlappable)
        return {
            "gpus": gpus,
            "hosts": self.network.hosts(gpus),
            "step_ms": 1e3 * seconds,
            "tokens_per_second": gpus * self.tokens / seconds,
            "efficiency": (self.compute + self.optimizer) / seconds,
            "waits_for": "network" if hidden > compute else "compute",
            "hidden_ms": 1e3 * hidden,
            "exposed_ms": 1e3 * sum(one.seconds for one in transfers if not one.overlappable),
        }

    def facts(self) -> dict[str, Any]:
        """All that is put in, to be written beside what comes out."""
        return asdict(self)
