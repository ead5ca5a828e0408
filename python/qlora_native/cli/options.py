"""Options that several commands share, and the loading that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_native.loading.precision import Precision, activation_dtype

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model folder, quantized folder, .gguf file, `owner/name` on the Hugging Face Hub, "
        "or `demo`.",
        show_default=False,
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a trained adapter to put on the model.", show_default=False),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="Activations: `auto` takes bfloat16 where the processor multiplies in it, "
        "else float32."
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; by default torch decides.", show_default=False),
]
FormatOption = Annotated[str, typer.Option(help="4-bit format of the weights: nf4 or fp4.")]
BlocksizeOption = Annotated[
    int, typer.Option(help="Weights that share a scale: a power of two, 32 to 4096.")
]
DoubleQuantOption = Annotated[
    bool, typer.Option(help="Quantize the scales as well (0.4 bits a weight less).")
]


def load_for_use(
    model: str, adapter: Path | None, dtype: Precision, threads: int | None
) -> tuple[Any, Any]:
    """The 4-bit model with its adapter, and its tokenizer; says on stderr what takes a moment."""
    import torch
    from rich.console import Console

    from qlora_native.adapter import load_adapter
    from qlora_native.loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    with Console(stderr=True).status(f"loading {model}"):
        loaded, tokenizer = load_model(model, dtype=activation_dtype(dtype))
        if adapter is not None:
            load_adapter(loaded, adapter)
    return loaded.eval(), tokenizer


def human_bytes(count: float) -> str:
    """`count` bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
