"""What is measured: one op on one shape in one dtype, and the contenders that do it.

A contender is made when its turn comes: calling its maker prepares its data and gives the function
that is timed. Ours is called OURS; a name that begins with it is a variant of ours.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch

OURS = "qlora_native"
COMPILED = " (compiled)"  # ends the name of what torch.compile makes: its first call takes long

Call = Callable[[], object]
Contenders = dict[str, Callable[[], Call]]


class Tier(enum.IntEnum):
    """Where a case is run; each tier has all cases of the ones before it."""

    CORE = 0  # pytest bench, bench.compare: a minute
    REPORT = 1  # bench.report: a quarter of an hour
    FULL = 2  # with --full


@dataclass(frozen=True)
class Case:
    """One row of a report, with the least that any way of doing it has to move and to compute."""

    op: str
    where: str  # the shape, by its model's name
    dtype: torch.dtype
    contenders: Contenders
    m: int | None = None  # rows of activations, where there are any
    read: int = 0  # bytes that must be read
    write: int = 0  # bytes that must be written
    flops: int = 0
    in_place: bool = False  # what is written was read before
    tier: Tier = Tier.REPORT

    @property
    def name(self) -> str:
        rows = () if self.m is None else (f"M={self.m}",)
        return ", ".join((self.op, self.where, *rows, dtype_name(self.dtype)))


def is_ours(contender: str) -> bool:
    return contender.startswith(OURS)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
