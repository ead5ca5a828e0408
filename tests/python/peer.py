"""bitsandbytes, whose bits the tests compare with: a test that asks for it is skipped without."""

from __future__ import annotations

from typing import Any

import pytest


class _Functional:
    """bitsandbytes.functional; torch has its ops too once something was asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "pytest")):  # what pytest asks of every name of a module
            raise AttributeError(name)
        return getattr(pytest.importorskip("bitsandbytes.functional"), name)


bnb = _Functional()
