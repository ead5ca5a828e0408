"""The machine's limits, measured by limits.c, which is compiled when it is first needed."""

from __future__ import annotations

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


@dataclass(frozen=True)
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
def measure(threads: int) -> Limits:
    """Compile limits.c and run it: some ten seconds.

    Raises:
        RuntimeError: there is no C compiler, or the program failed.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("bench/limits.c needs a C compiler: none of $CC, gcc, cc is there")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        flags = ["-O3", "-march=native", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
        levels = {
            "L1": _cache_bytes(1, 32 << 10) // 2,
            "L2": _cache_bytes(2, 1 << 20) // 2,
            "memory": MEMORY_BYTES,
        }
        arguments = [f"{name}={size}" for name, size in levels.items()]
        run = subprocess.run(
            [str(program), str(threads), *arguments], check=True, capture_output=True, text=True
        )
    return Limits(**json.loads(run.stdout))
