"""Runs all benchmarks in one process; writes docs/benchmarks.md, benchmarks.json and their charts.

    python -m bench.report                      # everything, on this machine, half an hour
    python -m bench.report --only adamw         # that section anew, the others stay as they are
    python -m bench.report --full               # every case, some hours
    python -m bench.report --quick --out /tmp   # tiny shapes: does it all run?
    THP_MEM_ALLOC_ENABLE=1 python -m bench.report   # torch's large tensors in huge pages, for all

A bench file has either cases(), which the harness times, or section(), which measures by itself.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import qlora_native
from bench import charts, harness, limits, machine, record, tables
from bench.case import Tier
from bench.record import Record
from bench.section import FOLDER, Section, modules

_DOCS = FOLDER.parent / "docs"

_ABOUT = (
    "Contenders run in one process, in shuffled rounds. *Median* and *best* are ours. *vs peer* is "
    "the median over rounds of its time over ours: what a peer does faster is marked "
    f"{tables.SLOWER}. Ours is forced to each ISA in turn; the peers keep the widest one that they "
    "know. Outputs are fresh for all contenders of a row unless it says reused, and new pages are "
    "dear on a virtual machine; AdamW works in place. A peer that takes seconds is timed once."
)
_ABOUT_LIMITS = (
    "*Of limit* is the least time that the machine's measured limits allow (bench/limit_model.py) "
    f"over our best: what is above it is marked {tables.ABOVE}, for the limit is wrong there. "
    "*Then* is the same by what memory gave just before and after the row, which on a shared "
    "machine may be half of its best."
)


def make_section(
    module: ModuleType, tier: Tier, budget: harness.Budget, isas: Sequence[str]
) -> Section:
    quick = budget is harness.SMOKE
    if hasattr(module, "section"):
        section: Section = module.section(quick)
        return section
    chosen = (case for case in module.cases(quick) if case.tier <= tier)
    rows = list(harness.run(chosen, budget, isas))
    return Section(module.TITLE, tables.markdown_table(rows), tables.to_json(rows))


def _gigabytes(level: dict[str, float]) -> str:
    kinds = ("read", "write", "copy", "update", "write_nt", "copy_nt")
    return " | ".join(f"{level[kind] / 1e9:.0f}" if kind in level else "–" for kind in kinds)


def _head(report: Record) -> str:
    info, measured = report["machine"], report["limits"]
    flops = ", ".join(f"{isa} {rate / 1e9:.0f}" for isa, rate in measured["flops"].items())
    standing = limits.working_sets(measured["threads"])
    levels = {name: measured["bandwidth"][name] for name in standing}
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report`; do not edit.",
        "",
        *textwrap.wrap(_ABOUT, 100),
        "",
        *textwrap.wrap(_ABOUT_LIMITS, 100),
        "",
        f"- {info['processor']} (family/model {info['family_model']}), {info['cores']} cores, "
        f"{info['threads']} threads used, {info['memory']}; ISAs {', '.join(info['isas'])}; "
        f"transparent huge pages {info['huge_pages']}",
        f"- torch {info['torch']}, bitsandbytes {info['bitsandbytes']}, torchao {info['torchao']}, "
        f"transformers {info['transformers']}, peft {info['peft']}, Python {info['python']}",
        f"- GFLOP/s, all threads (avx512bf16: bf16 pair products): {flops}",
        "",
        "GB/s of all threads by working set (MB of all threads), the best of all measurements; a "
        "copy and an update in place count both ways:",
        "",
        "| | MB | read | write | copy | update | write, non-temporal | copy, non-temporal |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {level['bytes_per_thread'] * measured['threads'] / 1e6:.3g} "
            f"| {_gigabytes(level)} |"
            for name, level in levels.items()
        ),
    ]
    return "\n".join(lines)


def _section(title: str, kept: dict[str, Any]) -> str:
    made = kept["made"]
    told = (
        f"{made['date']}, commit {made['commit']}; load average {made['load_before']} before, "
        f"{made['load_after']} after; {made['seconds']:.0f} s."
    )
    return f"## {title}\n\n{told}\n\n{kept['markdown']}"


def write(report: Record, out: Path) -> None:
    """The Markdown and the charts, from the report's JSON alone."""
    images = charts.draw(report, out / "images")
    drawn = "\n\n".join(f"![{title}](images/{path.name})" for title, path in images.items())
    sections = [_section(title, kept) for title, kept in report["sections"].items()]
    parts = [_head(report), drawn, *sections]
    (out / "benchmarks.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="tiny shapes, one round; needs --out")
    extent.add_argument("--full", action="store_true", help="every case")
    parser.add_argument("--only", action="append", default=[], metavar="OP")
    parser.add_argument("--isa", action="append", help="ours under this ISA (may be repeated)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=_DOCS)
    args = parser.parse_args()
    if args.quick and args.out == _DOCS:
        parser.error("--quick would put tiny shapes into docs/: give it a folder with --out")
    torch.set_num_threads(args.threads)
    tier = Tier.FULL if args.full else Tier.REPORT
    budget = harness.SMOKE if args.quick else harness.Budget()
    order = [module.TITLE for _, module in modules()]

    path = args.out / "benchmarks.json"
    report = record.load(path, machine.describe())
    measured = limits.measure(args.threads, budget.limit_tries)
    if report["limits"] is not None:
        measured.raise_to(limits.Limits(**report["limits"]))
    for name, module in modules(args.only):
        print(name, file=sys.stderr, flush=True)
        made = {**machine.moment(), "load_before": machine.load()}
        began = time.monotonic()
        section = make_section(module, tier, budget, args.isa or [qlora_native.cpu_isa()])
        made |= {"load_after": machine.load(), "seconds": round(time.monotonic() - began, 1)}
        report["limits"] = measured.to_json()
        record.put(report, section, made, order)
        record.save(report, path)  # a run that is cut off keeps what it has made
    write(report, args.out)
    print(f"wrote benchmarks.md, benchmarks.json and images in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
