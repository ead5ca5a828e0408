"""An allocation failed: let the optimizer's state go, and try once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, Python or an op of ours had no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
    )


def with_room(
    work: Callable[[], Result],
    optimizer: Any,
    *,
    undo: Callable[[], object],
    say: Callable[[str], object],
) -> Result:
    """work(), and once more where it ran out of memory that a paged optimizer can give back.

    Args:
        undo: puts back what a `work` that failed may have changed.
        say: is told what happened, in a line.

    Raises what `work` raises; an optimizer without `pressure` has nothing to give.
    """
    failure = None
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error) or not hasattr(optimizer, "pressure"):
            raise
        failure = str(error).partition("\n")[0]
    # Here the frames of what failed are gone, and what they held with them.
    undo()
    left = optimizer.pressure()
    say(
        f"Out of memory ({failure}): {left / 2**20:.0f} MiB of the optimizer's state were paged "
        "out; trying once more"
    )
    return work()
