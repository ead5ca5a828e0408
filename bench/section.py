"""A part of the report, and the benchmarks that make one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.case import Case, Tier

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    title: str
    markdown: str
    data: Any


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def modules(only: Sequence[str] = ()) -> list[tuple[str, ModuleType]]:
    """Every bench_<op>.py, or those named."""
    unknown = set(only) - set(names())
    if unknown:
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {names()}")
    return [
        (n, importlib.import_module(f"bench.bench_{n}")) for n in names() if not only or n in only
    ]


def all_cases(tier: Tier, quick: bool = False) -> Iterator[tuple[str, Case]]:
    """Every case of that tier and those before it, with its benchmark's name."""
    for name in names():
        module = importlib.import_module(f"bench.bench_{name}")
        if hasattr(module, "cases"):
            yield from ((name, c) for c in module.cases(quick) if c.tier <= tier)
