"""The ops under torch.vmap: a batch of activations is more rows; any other batch is refused.

torch would run an op without a rule once for each sample and warn that it is slow. A batch of
weights or of adapters has no op here, so it is refused; so is a batch of rows with dropout, whose
mask depends on a row's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora_native import _load as _load

Rule = Callable[..., tuple[Any, Any]]

# Ops that are linear in the rows of their first argument -> their outputs
ROWWISE: dict[str, int] = {"linear_4bit": 1, "linear_4bit_backward_input": 1, "qlora_linear": 2}
_DROPOUT_P = 11  # of qlora_linear's arguments


def _refuse(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"qlora_native::{name} has no batching rule for torch.vmap over {what}: call it in a loop, "
        "or give the samples a leading dimension of x"
    )


def rule_of(name: str, op: Callable[..., Any]) -> Rule:
    """How `op`, called by that name, is batched; for torch.library and torch.autograd.Function."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if name not in ROWWISE or any(dim is not None for dim in in_dims[1:]):
            raise _refuse(name, "anything but its first argument")
        if name == "qlora_linear" and args[_DROPOUT_P] > 0.0:
            raise _refuse(name, "rows with dropout")
        out = op(args[0].movedim(in_dims[0], 0), *args[1:])
        return out, (0 if ROWWISE[name] == 1 else (0,) * ROWWISE[name])

    return rule


def _refusing(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise _refuse(name, "its arguments")

    return call


_new_library: Any = torch.library.Library
_library: Any = _new_library("qlora_native", "IMPL", "FuncTorchBatched")


def _register() -> None:
    prefix = "qlora_native::"
    for full_name in torch._C._dispatch_get_all_op_names():
        name = full_name.removeprefix(prefix)
        if not full_name.startswith(prefix):
            continue
        if name in ROWWISE:
            op = getattr(torch.ops.qlora_native, name).default
            torch.library.register_vmap(full_name, rule_of(name, op), lib=_library)
        else:
            _library.impl(name, _refusing(name))


_register()
