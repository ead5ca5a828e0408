"""What paging costs: step time and residency against the budget, beside the disk's own rate.

State of AdamW, 8 bytes a value. *Plain* is the optimizer that pages nothing. Each round times a
step of every contender, and the disk: a file of the state's size in the same directory is written
in the pager's chunks and flushed, then read after the system was told to forget it. A paged step
reads and writes what does not stay, so that

    of the disk = (bytes in / its reading rate + bytes out / its writing rate) / step time
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from bench import machine
from bench.chart_style import BLUE, INK, ORANGE, new_figure, save
from bench.section import Section
from qlora_native.optim import AdamW, PagedAdamW
from qlora_native.paging.plan import CHUNK_BYTES

TITLE = "Paged optimizer"
# A disk, where /tmp is memory on some systems.
DIRECTORY = os.environ.get("TMPDIR", "/var/tmp")

_BEGIN, _END = "<!-- bench_paged:begin -->", "<!-- bench_paged:end -->"
_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the state


@dataclass(frozen=True)
class Disk:
    """Bytes a second of one file, in chunks, one after the other."""

    write: float
    read: float


@dataclass(frozen=True)
class Row:
    """One budget; bytes are of a step, the mean, and seconds the median."""

    budget: int
    seconds: float
    resident: int
    moved_in: float
    moved_out: float
    of_disk: float | None  # None: nothing moved


def measure_disk(directory: str, size: int, chunk: int = CHUNK_BYTES) -> Disk:
    """Of a file without a name, like the pager's."""
    block = memoryview(os.urandom(chunk))
    with tempfile.TemporaryFile(dir=directory) as file:
        handle = file.fileno()
        os.posix_fallocate(handle, 0, size)
        began = time.perf_counter()
        for offset in range(0, size, chunk):
            os.pwrite(handle, block, offset)
        os.fdatasync(handle)
        written = time.perf_counter()
        os.posix_fadvise(handle, 0, size, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(handle, 0, size, os.POSIX_FADV_SEQUENTIAL)
        into = bytearray(chunk)
        start = time.perf_counter()
        for offset in range(0, size, chunk):
            os.preadv(handle, [into], offset)
        end = time.perf_counter()
    return Disk(write=size / (written - began), read=size / (end - start))


class Contender:
    """An optimizer over parameters of its own, after the step that makes its state."""

    def __init__(self, make: Any, values: int, **settings: Any) -> None:
        shape = (values // 16,)
        self.params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(16)]
        for p in self.params:
            p.grad = torch.full_like(p, 1e-3)
        self.optimizer = make(self.params, **settings)
        self.optimizer.step()
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - began)


def measure(values: int, rounds: int) -> tuple[float, list[Row], Disk]:
    """Seconds of a plain step, a row for each budget, and the disk's rates."""
    state = 8 * values
    plain = Contender(AdamW, values)
    paged = {
        int(part * state): Contender(
            PagedAdamW,
            values,
            paging_directory=DIRECTORY,
            device_budget=int(part * state),
            min_paged_size=0,
        )
        for part in _FRACTIONS
    }
    disks = [measure_disk(DIRECTORY, state)]
    for each in paged.values():
        each.step()  # the file's every block was written once, now
        each.seconds.clear()
    before = {budget: each.optimizer.paging() for budget, each in paged.items()}
    for _ in range(rounds):
        for each in (plain, *paged.values()):
            each.step()
        disks.append(measure_disk(DIRECTORY, state))
    disk = Disk(median(d.write for d in disks), median(d.read for d in disks))
    rows = []
    for budget, each in paged.items():
        after = each.optimizer.paging()
        moved = [(after[key] - before[budget][key]) / rounds for key in ("moved_in", "moved_out")]
        seconds = median(each.seconds)
        needed = moved[0] / disk.read + moved[1] / disk.write
        rows.append(Row(budget, seconds, after["resident"], *moved, needed / seconds or None))
    return median(plain.seconds), rows, disk


def table(plain: float, rows: list[Row], disk: Disk, state: int) -> str:
    lines = [
        f"{state / 1e6:.0f} MB of AdamW's state in chunks of {CHUNK_BYTES >> 20} MiB; the disk "
        f"writes {disk.write / 1e6:.0f} and reads {disk.read / 1e6:.0f} MB/s.",
        "",
        "| budget | step | to plain | resident after it | read, written | of the disk |",
        "|---|---:|---:|---:|---:|---:|",
        f"| plain optimizer | {plain * 1e3:.1f} ms | 1.00× | | | |",
    ]
    for row in rows:
        share = "" if row.of_disk is None else f"{row.of_disk:.0%}"
        lines.append(
            f"| {row.budget / state:.0%} | {row.seconds * 1e3:.1f} ms "
            f"| {row.seconds / plain:.2f}× | {row.resident / state:.0%} "
            f"| {row.moved_in / 1e6:.0f}, {row.moved_out / 1e6:.0f} MB | {share} |"
        )
    return "\n".join(lines)


def section(quick: bool) -> Section:
    values, rounds = (1 << 20, 1) if quick else (32 << 20, 5)
    plain, rows, disk = measure(values, rounds)
    data = {
        "state": 8 * values,
        "plain_seconds": plain,
        "disk": asdict(disk),
        "rows": [asdict(row) for row in rows],
    }
    return Section(TITLE, table(plain, rows, disk, 8 * values), data)


def draw(data: dict[str, Any], path: Path) -> Path:
    rows, state = data["rows"], data["state"]
    figure, axes = new_figure(7, 3.2, "A step of PagedAdamW against its budget")
    budgets = [row["budget"] / state for row in rows]
    axes.plot(budgets, [row["seconds"] for row in rows], "o-", color=BLUE, label="step")
    axes.axhline(data["plain_seconds"], color=INK, lw=1, ls="--", label="step of AdamW")
    axes.set_xlabel("budget, of the state's bytes")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    resident = [row["resident"] / state for row in rows]
    right.plot(budgets, resident, "s-", color=ORANGE, label="resident")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_ylim(0, 1.05)
    right.set_ylabel("resident after the step")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save(figure, path)


def put(made: Section, folder: Path) -> None:
    """The chart, and the table between the marks of the page."""
    draw(made.data, folder / "images" / "paged.png")
    about = machine.describe()
    page = folder / "paging.md"
    head, rest = page.read_text().split(_BEGIN, 1)
    told = f"{about['processor']}, {torch.get_num_threads()} threads, {machine.moment()['date']}"
    tail = rest.split(_END, 1)[1]
    page.write_text(f"{head}{_BEGIN}\n{told}: {made.markdown}\n{_END}{tail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="little state, one round")
    parser.add_argument("--out", type=Path, help="folder of paging.md and its images/")
    args = parser.parse_args()
    result = section(args.quick)
    print(result.markdown)
    if args.out:
        put(result, args.out)
