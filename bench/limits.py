"""The machine's limits, measured by limits.c, which is compiled when it is first needed.

A limit is the best that was ever seen: on a shared machine the bandwidth of one moment is half that
of another, so it is measured again after each benchmark and never falls.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
MEMORY_BYTES = 256 << 20  # for each thread: past every cache


@dataclass
class Limits:
    """FLOP/s by instruction set (avx512bf16: of bf16 pair products), and bytes/s by level."""

    threads: int
    flops: dict[str, float]
    bandwidth: dict[str, dict[str, float]]  # level -> read, write, copy, write_nt, copy_nt

    def best_bandwidth(self, working_set: int) -> float:
        """The highest rate of the level that holds so many bytes, shared out over the threads."""
        for level in self.bandwidth.values():
            if working_set <= level["bytes_per_thread"] * self.threads:
                return _best(level)
        return _best(self.bandwidth["memory"])

    def raise_to(self, other: Limits) -> None:
        """Take over every rate that `other` has higher."""
        for isa, rate in other.flops.items():
            self.flops[isa] = max(self.flops[isa], rate)
        for level, rates in other.bandwidth.items():
            for kind, rate in rates.items():
                self.bandwidth[level][kind] = max(self.bandwidth[level][kind], rate)

    def to_json(self) -> dict[str, object]:
        return {"threads": self.threads, "flops": self.flops, "bandwidth": self.bandwidth}


def _best(level: dict[str, float]) -> float:
    return max(rate for kind, rate in level.items() if kind != "bytes_per_thread")


def _cache_bytes(level: int, default: int) -> int:
    try:
        size = os.sysconf(
            f"SC_LEVEL{level}_DCACHE_SIZE" if level == 1 else f"SC_LEVEL{level}_CACHE_SIZE"
        )
    except (ValueError, OSError):
        size = 0
    return size if size > 0 else default


@functools.cache
def _program() -> str:
    """limits.c, compiled; gone at exit."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("bench/limits.c needs a C compiler: none of $CC, gcc, cc is there")
    folder = tempfile.mkdtemp(prefix="limits")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = str(Path(folder) / "limits")
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", program], check=True)
    return program


def _measure_now(threads: int) -> Limits:
    levels = {
        "L1": _cache_bytes(1, 32 << 10) // 2,
        "L2": _cache_bytes(2, 1 << 20) // 2,
        "L3": _cache_bytes(3, 8 << 20) // 2 // threads,  # shared by all
        "memory": MEMORY_BYTES,
    }
    arguments = [f"{name}={size}" for name, size in levels.items()]
    run = subprocess.run(
        [_program(), str(threads), *arguments], check=True, capture_output=True, text=True
    )
    return Limits(**json.loads(run.stdout))


@functools.cache
def measure(threads: int) -> Limits:
    """The limits, some ten seconds when they are first asked for.

    Raises:
        RuntimeError: there is no C compiler.
        subprocess.CalledProcessError: it failed.
    """
    return _measure_now(threads)


def measure_again(threads: int) -> Limits:
    """The same object, with every rate raised to what is seen now."""
    limits = measure(threads)
    limits.raise_to(_measure_now(threads))
    return limits
