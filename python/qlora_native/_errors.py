"""Turns what crosses torch's stable boundary, RuntimeError alone, into Python's own exceptions.

The C++ layer checks every argument once (cpp/torch/checks.h) and states each error as
"qlora_native::<op>: <argument> must <expectation>, got <value>". Nothing is checked twice, and a
call that succeeds pays nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def to_python_error(error: RuntimeError) -> Exception:
    """The exception that a Python user expects in place of this one."""
    message = str(error)
    if message.startswith("qlora_native::") and " must " in message:
        return TypeError(message) if " must have dtype " in message else ValueError(message)
    if message.startswith("qlora_native::") and "Expected a value of type" in message:
        return TypeError(message.partition("\n")[0])
    if isinstance(error, NotImplementedError) and "'qlora_native::" in message:
        op, _, rest = message.partition("'qlora_native::")[2].partition("'")
        device = rest.partition("from the '")[2].partition("'")[0]
        return NotImplementedError(
            f"qlora_native::{op}: all tensors must be dense CPU tensors, as this build has kernels "
            f"for no other device, got one for torch's '{device}' backend"
        )
    return error


def python_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` raise ValueError and TypeError for bad arguments."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            python_error = to_python_error(error)
            if python_error is error:
                raise
            raise python_error from None

    return call
