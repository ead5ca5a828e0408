"""`qlora-native quantize`: writes a 4-bit folder, and says what that cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qlora_native.cli.config import ConfigFile
from qlora_native.cli.errors import fail
from qlora_native.cli.options import (
    BlocksizeOption,
    DoubleQuantOption,
    FormatOption,
    ModelArgument,
    PrecisionOption,
    ThreadsOption,
    human_bytes,
)


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    format: FormatOption = "nf4",
    blocksize: BlocksizeOption = 64,
    double_quant: DoubleQuantOption = True,
    dtype: PrecisionOption = "auto",
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Go on with weights that GPTQ or AWQ has quantized already."
        ),
    ] = False,
    threads: ThreadsOption = None,
    config: ConfigFile = None,
) -> None:
    """Quantize a model to 4 bits and write it as a folder that loads at once.

    The folder is in bitsandbytes' form: this package loads it, and so does transformers with
    bitsandbytes. Embeddings, norms and the output head keep DTYPE.

    Example: qlora-native quantize path/to/model path/to/model-nf4
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from qlora_native.loading import activation_dtype, load_model, save_quantized
    from qlora_native.loading.cost import QuantizationCost

    if threads is not None:
        torch.set_num_threads(threads)
    cost = QuantizationCost()
    began = time.monotonic()
    with Console(stderr=True).status(f"quantizing {model}"):
        loaded, tokenizer = load_model(
            model,
            dtype=activation_dtype(dtype),
            format=format,
            blocksize=blocksize,
            double_quant=double_quant,
            requantize=requantize,
            cost=cost,
        )
        if not cost.layers:
            fail(f"{model} has no weight left to quantize: it is quantized already")
        save_quantized(loaded, tokenizer, output)
    size = sum(path.stat().st_size for path in output.iterdir())
    scales = "double-quantized scales" if double_quant else "float32 scales"
    table = Table(show_header=False, box=None)
    for name, value in (
        ("written", f"{output} ({human_bytes(size)})"),
        ("format", f"{format}, blocks of {blocksize}, {scales}"),
        ("quantized", f"{cost.layers} linears, {cost.parameters:,} weights"),
        ("storage", f"{cost.bits_per_parameter:.3f} bits a weight"),
        ("relative error", f"{cost.relative_error:.4f} (‖W − W4‖ / ‖W‖ over all)"),
        ("largest", f"{cost.worst_error:.4f} in {cost.worst}"),
        ("time", f"{time.monotonic() - began:.1f} s"),
    ):
        table.add_row(name, value)
    Console().print(table)
