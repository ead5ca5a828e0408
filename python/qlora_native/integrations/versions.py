"""Which versions of other libraries the tests have run with, and a word where another is there."""

from __future__ import annotations

import warnings
from importlib.metadata import version

# library -> first version tested, and the first one after the last
TESTED = {"transformers": ("5.23", "5.24"), "peft": ("0.21", "0.22")}

_told: set[str] = set()


def check(library: str) -> None:
    """Warn, once for each library, where its version is outside the tested range."""
    first, end = TESTED[library]
    found = version(library)
    if library in _told or _key(first) <= _key(found) < _key(end):
        return
    _told.add(library)
    warnings.warn(
        f"qlora_native is tested with {library} >= {first}, < {end}, and {found} is installed: "
        "results may differ; if something breaks, install a tested version",
        stacklevel=3,
    )


def _key(text: str) -> tuple[int, ...]:
    """Its release numbers: "5.23.0.dev0" -> (5, 23, 0)."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
