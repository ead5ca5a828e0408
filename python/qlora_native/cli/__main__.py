"""`qlora-native`, also as `python -m qlora_native.cli`: the table of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.exit(
        "error: the command line needs typer, rich and pyyaml: pip install 'qlora-native[cli]'"
    )

from qlora_native.cli.errors import DEBUG_VARIABLE, one_line_errors
from qlora_native.cli.eval import eval_command
from qlora_native.cli.generate import generate
from qlora_native.cli.info import info
from qlora_native.cli.merge import merge
from qlora_native.cli.quantize import quantize
from qlora_native.cli.train import train

_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "generate": generate,
    "eval": eval_command,
    "quantize": quantize,
    "merge": merge,
    "info": info,
}

app = typer.Typer(
    name="qlora-native",
    help="Fine-tune language models whose base weights are stored in 4 bits (QLoRA), on a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog="`qlora-native COMMAND --help` explains a command. Start with `train`.")
def _root(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Print the traceback of an error. Valid anywhere on the line."
        ),
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


for _name, _command in _COMMANDS.items():
    app.command(_name)(one_line_errors(_command))


def main(arguments: list[str] | None = None) -> None:
    """The entry point. `--debug` belongs to no command, so it is taken out wherever it stands."""
    words = sys.argv[1:] if arguments is None else arguments
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    app(words, prog_name="qlora-native")


if __name__ == "__main__":
    main()
