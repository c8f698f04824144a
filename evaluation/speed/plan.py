"""`foxlm bench plan`: what a measurement of `foxlm bench train --gpus N` says of other numbers of GPUs and networks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, report
from .markdown import digits, percent, table
from .scaling import StepModel

_GPUS = (1, 2, 4, 8, 16, 32, 64)


def plan(
    file: Annotated[Path, typer.Argument(help="JSON file that foxlm bench train --gpus N wrote.")],
    gpus: Annotated[
        list[int] | None, typer.Option(help=f"GPUs to plan for; may be repeated; {', '.join(map(str, _GPUS))}.")
    ] = None,
    host_gpus: Annotated[int | None, typer.Option(help="GPUs of a host, if not those in the file.")] = None,
    host_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s into a host from the others, if not those in the file.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Predict training steps on more GPUs than were measured, from one measurement. Needs no GPU.

    Compute scales perfectly; what FSDP2 sends goes at the measured rates within a host, and at the rate you give
    between hosts; what computing cannot hide is added. Latencies and slow GPUs are left out.
    """
    for one in gpus or _GPUS:
        options.require_positive("--gpus", one)
    network: dict[str, Any] = {}
    if host_gpus is not None:
        options.require_positive("--host-gpus", host_gpus)
        network["host_gpus"] = host_gpus
    if host_bandwidth is not None:
        network["host_bandwidth"] = 1e9 * options.positive_bandwidth(host_bandwidth)
    plans = planned(report.read(file), gpus or _GPUS, network)
    typer.echo(report.to_json(plans) if as_json else "\n\n".join(map(_render, plans)))


def planned(
    results: report.Results, gpus: list[int] | tuple[int, ...], network: dict[str, Any]
) -> list[dict[str, Any]]:
    """Predictions for each step of ``results``: ``name``, ``model`` (what they are made from) and ``predictions``.

    Raises:
        ValueError: the results say nothing of several GPUs.
    """
    if not results.get("scaling"):
        raise ValueError(
            "FILE must hold results of foxlm bench train --gpus N with steps that were measured, got others"
        )
    plans = []
    for one in results["scaling"]:
        model = StepModel.of_facts(one["model"] | {"network": one["model"]["network"] | network})
        predictions = [model.predict(n) for n in gpus]
        plans.append({"name": one["name"], "model": model.facts(), "predictions": predictions})
    return plans


def _render(plan: dict[str, Any]) -> str:
    columns = ["GPUs", "hosts", "ms", "tokens/s", "efficiency", "waits for", "sending, hidden ms", "not hidden ms"]
    rows = [
        [
            str(step["gpus"]),
            str(step["hosts"]),
            digits(step["step_ms"]),
            f"{step['tokens_per_second']:,.0f}",
            percent(step["efficiency"]),
            step["waits_for"],
            digits(step["hidden_ms"]),
            digits(step["exposed_ms"]),
        ]
        for step in plan["predictions"]
    ]
    network = plan["model"]["network"]
    between, gather, scatter = (f"{network[x] / 1e9:.3g}" for x in ("host_bandwidth", "all_gather", "reduce_scatter"))
    what = (
        f"{plan['name']}: hosts of {network['host_gpus']} GPUs, {between} GB/s into each; within them {gather} "
        f"(gathering) and {scatter} (scattering) into each GPU, measured."
    )
    return f"{what}\n\n{table(columns, rows)}"
