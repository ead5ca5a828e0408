"""Loads the native library, which registers the ops with torch, or says why it cannot."""

from __future__ import annotations

import torch

# The stable ABI that cmake/TorchStable.cmake builds for.
MIN_TORCH = (2, 10)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def load() -> None:
    """Import `qlora_native._core`, and libqlora_native with it.

    Raises:
        ImportError: torch is older than 2.10, or the library is not there or does not load.
    """
    if _torch_version() < MIN_TORCH:
        raise ImportError(
            f"qlora_native needs torch >= {'.'.join(map(str, MIN_TORCH))}, "
            f"got torch {torch.__version__}"
        )
    try:
        from qlora_native import _core  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"qlora_native's native library did not load under torch {torch.__version__}: {error}. "
            "It is built by `pip install --no-build-isolation .`; a source tree on the path has "
            "none."
        ) from error


load()
