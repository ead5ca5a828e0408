"""`qlora-native merge`: an adapter goes into its model's weights for good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_native.cli.config import ConfigFile
from qlora_native.cli.options import (
    ModelArgument,
    PrecisionOption,
    ThreadsOption,
    human_bytes,
    load_for_use,
)

StoredAs = Literal["bfloat16", "float16", "float32", "4bit"]


def merge(
    model: ModelArgument,
    adapter: Annotated[
        Path, typer.Argument(help="Folder of the trained adapter.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    stored_as: Annotated[
        StoredAs,
        typer.Option(
            "--as",
            help="Weights of the merged model; `4bit` quantizes them again, which costs accuracy.",
        ),
    ] = "bfloat16",
    dtype: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    config: ConfigFile = None,
) -> None:
    """Merge an adapter into its model and write an ordinary model folder.

    Reports what the rounding to the stored form costs: the weights' relative error, and the KL
    divergence of the merged model from base plus adapter on a few prompts.

    Example: qlora-native merge demo runs/demo/adapter merged --as bfloat16
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from qlora_native.merging import save_merged

    loaded, tokenizer = load_for_use(model, adapter, dtype, threads)
    with Console(stderr=True).status(f"writing {output}"):
        report = save_merged(
            loaded,
            tokenizer,
            output,
            dtype=None if stored_as == "4bit" else getattr(torch, stored_as),
        )
    size = sum(path.stat().st_size for path in output.iterdir())
    table = Table(show_header=False, box=None)
    for row in (
        ("written", f"{output} ({human_bytes(size)})"),
        ("merged", f"{report.layers} linears, stored as {stored_as}"),
        ("adapter's change", f"{report.relative_change:.4%} of the weights (‖D‖ / ‖W‖)"),
        ("kept of it", f"{report.kept:.1%} (the rest is rounded away)"),
        ("error of storing", f"{report.relative_error:.4%} (‖stored − (W + D)‖ / ‖W + D‖)"),
        ("largest", f"{report.worst_error:.4%} in {report.worst}"),
        ("KL divergence", f"{report.kl:.2e} nats a token, over {report.tokens} tokens"),
        ("same first choice", f"{report.same_top:.1%}"),
    ):
        table.add_row(*row)
    Console().print(table)
