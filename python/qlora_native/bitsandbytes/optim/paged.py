"""The names of the paged optimizers, whose state may exceed the device's memory."""

from __future__ import annotations

from qlora_native.bitsandbytes._missing import missing_class


def not_yet(name: str, module: str, unpaged: type) -> type:
    """A class that says which one to take in its place."""
    return missing_class(name, module, f"paged state is not wired yet; take {unpaged.__name__}")
