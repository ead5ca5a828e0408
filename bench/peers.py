"""The packages that ours is compared with; one that is missing is left out and named as missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util

PACKAGES = ("bitsandbytes", "torchao", "transformers", "peft")


def installed(package: str) -> bool:
    """Whether it can be imported, without doing so."""
    return importlib.util.find_spec(package) is not None


def versions() -> dict[str, str]:
    """Version of every peer, or "not installed"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
