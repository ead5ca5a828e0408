"""Rows as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.case import OURS, dtype_name
from bench.harness import Row
from bench.limit_model import BEYOND

SLOWER = "🔴"  # beside every ratio that a peer wins
NOISE = 0.98  # a ratio above it is no defeat
ABOVE = "⚠"  # beside a share of the limit that no share can be: the limit is wrong there


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.1f} µs"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def _rate(row: Row) -> str:
    case, best = row.case, row.best()
    if case.flops:
        return f"{case.flops / best / 1e9:.0f} GFLOP/s"
    return f"{(case.read + case.write) / best / 1e9:.1f} GB/s"


def ratio(value: float) -> str:
    """A speed-up; what is slower than the peer beyond the noise is marked."""
    return f"{value:.2f}×{' ' + SLOWER if value < NOISE else ''}"


def share(value: float) -> str:
    """Of the limit; what is above it is marked."""
    return f"{value:.0%}{' ' + ABOVE if value > BEYOND else ''}"


def markdown_table(rows: Sequence[Row]) -> str:
    """One line a row: our time, rate and share of the limit, and the speed-up over each peer."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    head = [
        "case",
        "ISA",
        "median",
        "best",
        "rate",
        "of limit",
        "then",
        *(f"vs {p}" for p in peers),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * 2 + "|---:" * (len(head) - 2) + "|"]
    for row in rows:
        cells = [
            row.case.name,
            row.isa,
            seconds(row.median()),
            seconds(row.best()),
            _rate(row),
            share(row.of_limit()),
            f"{row.of_limit_then():.0%}",
            *(ratio(row.speedup(p)) if p in row.samples else "" for p in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "case": row.case.name,
            "where": row.case.where,
            "m": row.case.m,
            "dtype": dtype_name(row.case.dtype),
            "isa": row.isa,
            "read_bytes": row.case.read,
            "write_bytes": row.case.write,
            "flops": row.case.flops,
            "limit_seconds": row.limit(),
            "of_limit": row.of_limit(),
            "of_limit_then": row.of_limit_then(),
            "contenders": {
                name: {
                    "median_seconds": row.median(name),
                    "best_seconds": row.best(name),
                    "rounds": len(samples),
                    **({} if name == OURS else {"speedup_of_ours": row.speedup(name)}),
                }
                for name, samples in row.samples.items()
            },
        }
        for row in rows
    ]
