"""What from_pretrained quantized, what it left and why, and how many bytes that is."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

# What is left by wish or by its nature: worth no warning.
_EXPECTED = ("an embedding", "in skip_modules", "left by default")


class Left(NamedTuple):
    """Why a module is not quantized, and the bytes of its own parameters."""

    why: str
    nbytes: int


@dataclass
class LoadReport:
    """Names of the quantized layers, and of those left: name -> Left(why, nbytes)."""

    quantized: list[str] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)

    def leave(self, name: str, module: nn.Module, why: str) -> None:
        nbytes = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        self.left[name] = Left(why, nbytes)

    def unexpected(self) -> dict[str, Left]:
        """What was left though one would have it quantized."""
        return {n: left for n, left in self.left.items() if not left.why.startswith(_EXPECTED)}

    def tell(self, model: nn.Module, logger: logging.Logger) -> None:
        """Log it: as a warning where something is left that one would have quantized."""
        if not self.quantized:
            logger.warning("No layer of %s is quantized.\n%s", type(model).__name__, self)
        elif unexpected := self.unexpected():
            logger.warning(
                "%d layers of %s are quantized; these are not:\n%s",
                len(self.quantized),
                type(model).__name__,
                _lines(unexpected),
            )
        else:
            logger.info("%s", self)

    def __str__(self) -> str:
        return f"{len(self.quantized)} layers quantized; left:\n{_lines(self.left)}"


def _lines(left: dict[str, Left]) -> str:
    """One line for the layers that differ in their numbers alone."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, (why, nbytes) in left.items():
        groups.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", name), why), []).append(nbytes)
    return "\n".join(
        f"  {name}{f' ({len(sizes)} of them)' if len(sizes) > 1 else ''}: {why}; "
        f"{sum(sizes) / 2**20:.1f} MiB"
        for (name, why), sizes in groups.items()
    )
