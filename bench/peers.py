"""The packages that ours is compared with; one that is missing is left out and named as missing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType

PACKAGES = ("bitsandbytes", "torchao", "transformers", "peft")


@functools.cache
def peer(module: str) -> ModuleType | None:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        return None


def versions() -> dict[str, str]:
    """Version of every peer, or "not installed"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
