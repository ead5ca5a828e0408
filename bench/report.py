"""Runs all benchmarks in one process and writes docs/benchmarks.md and docs/benchmarks.json.

    python -m bench.report                      # everything, on this machine, some twenty minutes
    python -m bench.report --only adamw         # one of them
    python -m bench.report --quick --out /tmp   # tiny shapes: does it all run?

A bench file has either cases(), which the harness times, or section(), which measures by itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import qlora_native
from bench import harness, limits, machine, tables

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One benchmark's part of the report."""

    title: str
    markdown: str
    data: Any


def modules(only: Sequence[str]) -> list[tuple[str, ModuleType]]:
    """Every bench_<op>.py, or those named."""
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    unknown = set(only) - set(names)
    if unknown:
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {names}")
    return [
        (n, importlib.import_module(f"bench.bench_{n}")) for n in names if not only or n in only
    ]


def make_section(module: ModuleType, quick: bool, isas: Sequence[str]) -> Section:
    if hasattr(module, "section"):
        section: Section = module.section(quick)
        return section
    budget = harness.SMOKE if quick else harness.Budget()
    rows = list(harness.run(module.cases(quick), budget, isas))
    return Section(module.TITLE, tables.markdown_table(rows), tables.to_json(rows))


def _gigabytes(level: dict[str, float]) -> str:
    kinds = ("read", "write", "copy", "write_nt", "copy_nt")
    return " | ".join(f"{level[kind] / 1e9:.0f}" if kind in level else "–" for kind in kinds)


def _head(info: dict[str, Any], measured: limits.Limits) -> str:
    flops = ", ".join(f"{isa} {rate / 1e9:.0f}" for isa, rate in measured.flops.items())
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report`; do not edit. Contenders run in one process, in",
        "shuffled rounds. *Median* and *best* are ours; *of limit* is the least time that the",
        "machine's measured limits allow over our best; *vs peer* is the median over rounds of its",
        "time over ours, and",
        f"{tables.SLOWER} marks what a peer does faster. Ours is forced to each ISA in turn; the",
        "peers keep the widest one that they know.",
        "",
        f"- {info['processor']} (family/model {info['family_model']}), {info['cores']} cores, "
        f"{info['threads']} threads used, {info['memory']}; ISAs {', '.join(info['isas'])}",
        f"- {info['date']}, commit {info['commit']}; load average {info['load_before']} before, "
        f"{info['load_after']} after; transparent huge pages {info['huge_pages']}",
        f"- torch {info['torch']}, bitsandbytes {info['bitsandbytes']}, torchao {info['torchao']}, "
        f"transformers {info['transformers']}, peft {info['peft']}, Python {info['python']}",
        f"- GFLOP/s, all threads (avx512bf16: bf16 pair products): {flops}",
        "",
        "| GB/s, all threads | read | write | copy | write, non-temporal | copy, non-temporal |",
        "|---|---:|---:|---:|---:|---:|",
        *(f"| {name} | {_gigabytes(level)} |" for name, level in measured.bandwidth.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--only", action="append", default=[], metavar="OP")
    parser.add_argument("--isa", action="append", help="ours under this ISA (may be repeated)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "docs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    chosen = modules(args.only)
    info = {**machine.describe(), "load_before": machine.load()}
    measured = limits.measure(args.threads)
    sections = []
    for name, module in chosen:
        print(name, file=sys.stderr, flush=True)
        sections.append(make_section(module, args.quick, args.isa or [qlora_native.cpu_isa()]))
    info["load_after"] = machine.load()

    parts = [_head(info, measured), *(f"## {s.title}\n\n{s.markdown}" for s in sections)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks.md").write_text("\n\n".join(parts) + "\n")
    data = {
        "machine": info,
        "limits": measured.to_json(),
        "sections": {s.title: s.data for s in sections},
    }
    (args.out / "benchmarks.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {args.out / 'benchmarks.md'} and benchmarks.json", file=sys.stderr)


if __name__ == "__main__":
    main()
