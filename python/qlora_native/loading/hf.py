"""transformers, imported when it is first needed; untyped, as its own annotations are partial."""

from __future__ import annotations

import importlib
from typing import Any


def hf(module: str = "") -> Any:
    """The package transformers, or a module of it.

    Raises ModuleNotFoundError where it is not installed (extra `hf`).
    """
    return importlib.import_module(f"transformers.{module}" if module else "transformers")
