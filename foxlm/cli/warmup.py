"""``foxlm warmup``."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer


def warmup(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model's folder, its name on the Hugging Face Hub, or a preset: pro-760m."
        ),
    ],
    arch: Annotated[
        str | None,
        typer.Option(help="Kind of GPU to compile for, as sm_90 for H100 and H200. Default: the one in this machine."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, float16, float32, or auto: that of the saved weights, if known, else bfloat16."),
    ] = "auto",
    train: Annotated[
        bool, typer.Option("--train", help="Training steps too, in that dtype and with autocast.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", help="Sequences at a time.")] = 1,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="dynamic, static or paged; repeat it for several. Default: dynamic and static."),
    ] = None,
) -> None:
    """Compile a model's kernels into Triton's cache before it runs, for example while a container image is built."""
    import torch

    from foxlm import FoxConfig
    from foxlm.warmup import compile_kernels

    if re.fullmatch(r"(pro|llama)-\d+m", model) and not Path(model).exists():
        config = FoxConfig.preset(model)
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
        if not isinstance(config, FoxConfig):
            raise ValueError(f"MODEL must be a FoX model, got one of model_type {config.model_type!r}")
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in (*known, "auto"):
        raise ValueError(f"--dtype must be auto, {', '.join(known)}, got {dtype!r}")
    wanted = known[dtype] if dtype != "auto" else config.dtype or torch.bfloat16
    start = time.perf_counter()
    kernels = compile_kernels(
        config, dtype=wanted, arch=arch, train=train, batch_size=batch_size, caches=cache or ("dynamic", "static")
    )
    seconds = time.perf_counter() - start
    from triton import knobs

    for kernel in sorted(kernels, key=lambda x: -x.seconds):
        typer.echo(f"{kernel.seconds:6.2f} s  {kernel.name}{'  (was there)' if kernel.was_cached else ''}")
    new = sum(not kernel.was_cached for kernel in kernels)
    typer.echo(f"compiled {new} kernels in {seconds:.1f} s, {len(kernels) - new} were there: {knobs.cache.dir}")
    if not kernels:
        typer.echo("a model like this runs in PyTorch and has no kernels")
    elif not torch.cuda.is_available():
        typer.echo(
            "torch sees no GPU here, so nothing was run: the first process on a GPU still builds Triton's launchers "
            "(a C compiler's second or two; with Triton 3.7 one launcher for all kernels)"
        )
