"""What a roofline shows of results: work and traffic, the rates reached, and those of a large product and copy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foxlm.evaluation.loading import DTYPES

from .inputs import Case

_PARTS = {"forward": "forward", "forward_backward": "forward and backward"}


@dataclass(frozen=True)
class Point:
    """One implementation on one shape.

    Attributes:
        case: the shape.
        name: of the implementation.
        part: ``"forward"`` or ``"forward and backward"``.
        flops_per_byte: operations of the tiles that it keeps, over the bytes that it must read and write.
        tflops: rate of those operations.
    """

    case: str
    name: str
    part: str
    flops_per_byte: float
    tflops: float


@dataclass(frozen=True)
class Rate:
    """What one way to decode reads, and how fast.

    Attributes:
        batch: sequences.
        name: of the way to decode.
        bytes_per_second: weights, and keys and values that are kept, over the time of a step.
    """

    batch: int
    name: str
    bytes_per_second: float


@dataclass(frozen=True)
class Roofline:
    """Rates reached, and those that nothing exceeds.

    Attributes:
        device: what was measured; of a CPU with the words that it says nothing of a GPU.
        points: of attention.
        rates: of decoding.
        tflops: of a large matrix product, the fastest of the runs; None where no attention was measured.
        bytes_per_second: of a large copy, likewise; None where none was measured.
    """

    device: str
    points: list[Point]
    rates: list[Rate]
    tflops: float | None
    bytes_per_second: float | None


def points_of(several: Sequence[dict[str, Any]]) -> Roofline:
    """What the results of attention and decoding among ``several`` show.

    Raises:
        ValueError: there is nothing to show, or they are of several devices.
    """
    devices = sorted({results["run"]["device"] for results in several})
    if len(devices) > 1:
        raise ValueError(f"results shown together must be of one device, got {devices}")
    cases = [(case, results) for results in several if results["kind"] == "attention" for case in results["cases"]]
    batches = [one for results in several if results["kind"] == "decode" for one in results["batches"]]
    points = [point for case, results in cases for point in _points(case, results["settings"]["dtype"])]
    rates = [rate for batch in batches for rate in _rates(batch)]
    if not points and not rates:
        raise ValueError("the files must hold results of attention, or of decoding with the rate of a copy, got none")
    products = [case["ceiling_tflops"] for case, _ in cases if case["ceiling_tflops"]]
    copies = [one["copy_rate"] for one in (*(case for case, _ in cases), *batches) if one.get("copy_rate")]
    device = devices[0] + ("" if several[0]["run"].get("on_gpu", True) else ": figures of no use")
    return Roofline(device, points, rates, max(products, default=None), max(copies, default=None))


def _points(record: dict[str, Any], dtype: str) -> Iterator[Point]:
    case = Case.parse(record["case"], record.get("kv_heads"))
    label = str(case) + (f", {record['recorded']['model']}" if "recorded" in record else "")
    for one in record["implementations"]:
        for part, shown in _PARTS.items():
            if part in one:
                backward = part == "forward_backward"
                work = one["tiles_kept"] * case.flops(backward) / case.traffic(DTYPES[dtype].itemsize, backward)
                yield Point(label, one["name"], shown, work, one[part]["done_tflops"])


def _rates(batch: dict[str, Any]) -> Iterator[Rate]:
    for one in batch["decoders"]:
        # Results of earlier versions do not say what is read of the weights.
        if one.get("read_bytes") is not None and "weight_bytes" in one:
            read = one["weight_bytes"] + one["read_bytes"]
            yield Rate(batch["batch"], one["name"], 1e3 * read / one["step"]["ms"])
