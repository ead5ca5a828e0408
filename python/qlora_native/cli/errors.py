"""Where exceptions become one line on stderr and an exit code; no command catches its own.

Exit codes: 2 for what the user can change (a file, a setting, memory, disk), 130 after Ctrl-C, 1
for a defect of ours. With `--debug` the traceback is printed in every case.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import typer

from qlora_native.paging import is_out_of_memory

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_USER = 2
EXIT_DEFECT = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DEBUG_VARIABLE = "QLORA_NATIVE_DEBUG"

_EXTRA_OF = {
    "transformers": "hf",
    "safetensors": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "yaml": "cli",
    "rich": "cli",
    "matplotlib": "cli",
}


def one_line_errors(command: Command) -> Command:
    """`command`, ending in one clear line and the right exit code where it would raise."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as error:
            _end("interrupted", EXIT_INTERRUPTED, error)
        except BrokenPipeError as error:  # the reader of our output went away: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(EXIT_DEFECT) from error
        except Exception as error:
            text = explain(error)
            if text is None:
                kind = f"{type(error).__name__}: {_first_line(error)}"
                hint = "this looks like a defect; run again with --debug and report the traceback"
                _end(f"{kind} ({hint})", EXIT_DEFECT, error)
            _end(text, EXIT_USER, error)

    return cast(Command, run)


def fail(text: str) -> NoReturn:
    """End the command with `error: text` and the exit code for what the user can change."""
    _end(text, EXIT_USER, None)


def explain(error: BaseException) -> str | None:
    """What the user can do about `error`, or None if it is not theirs to mend."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({_first_line(error)}): use a smaller --batch-size or --max-length, "
            "turn on --gradient-checkpointing, load in a 16-bit --dtype, or take "
            "--optim paged_adamw8bit"
        )
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = _EXTRA_OF.get(error.name.partition(".")[0])
        remedy = f"pip install 'qlora-native[{extra}]'" if extra else f"pip install {error.name}"
        return f"the Python package {error.name!r} is not installed: {remedy}"
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, (ValueError, KeyError, ImportError, ArithmeticError)):
        return " ".join(str(error.args[0] if error.args else error).split())
    return None


def _explain_os_error(error: OSError) -> str:
    where = f" {error.filename}" if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing{where}: free some space or choose another folder"
    if isinstance(error, FileNotFoundError):
        return f"no such file or folder:{where or ' ' + str(error)}"
    if isinstance(error, PermissionError):
        return f"no permission for{where}: choose another path or change its rights"
    return " ".join(str(error).split())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _end(text: str, code: int, error: BaseException | None) -> NoReturn:
    if error is not None and os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    sys.stdout.flush()
    typer.echo(f"error: {text}" if code != EXIT_INTERRUPTED else text, err=True)
    raise SystemExit(code) from error
