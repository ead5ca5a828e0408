"""The machine's limits, measured by limits.c, which is compiled when it is first needed.

A limit is the best that was ever seen: on a shared machine the bandwidth of one moment is half that
of another, so the working sets of a case that lie past a core's own caches are probed just before
and after it, and a limit never falls. What the probes beside a case saw is kept with its row.
"""

from __future__ import annotations

import atexit
import bisect
import functools
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
MEMORY_BYTES = 256 << 20  # for each thread: past every cache
TRIES = 15
_PROBE_TRIES = 2

READ: Collection[str] = ("read",)
WRITE: Collection[str] = ("write", "write_nt")
ANY: Collection[str] = (*READ, *WRITE, "copy", "copy_nt", "update")


@dataclass
class Limits:
    """FLOP/s by instruction set (avx512bf16: of bf16 pair products), and bytes/s by level."""

    threads: int
    flops: dict[str, float]
    bandwidth: dict[str, dict[str, float]]  # level -> bytes_per_thread and the kinds of ANY

    def rate(self, kinds: Collection[str], working_set: int) -> float:
        """The best of these kinds' rates on so many bytes, shared out over the threads.

        Between two sizes that were measured it is interpolated, on logarithmic scales: caches let
        go of data little by little.
        """
        points = sorted(
            (level["bytes_per_thread"] * self.threads, max(level.get(kind, 0.0) for kind in kinds))
            for level in self.bandwidth.values()
        )
        sizes = [size for size, _ in points]
        above = bisect.bisect_left(sizes, working_set)
        if above == 0:
            return points[0][1]
        if above == len(points):
            return points[-1][1]
        (small, fast), (large, slow) = points[above - 1], points[above]
        part = math.log(working_set / small) / math.log(large / small)
        return math.exp((1 - part) * math.log(fast) + part * math.log(slow))

    def raise_to(self, other: Limits) -> None:
        """Take over every rate that `other` has higher."""
        for isa, rate in other.flops.items():
            self.flops[isa] = max(self.flops[isa], rate)
        for level, rates in other.bandwidth.items():
            mine = self.bandwidth.get(level, {})
            raised = {kind: max(mine.get(kind, rate), rate) for kind, rate in rates.items()}
            self.bandwidth[level] = mine | raised

    def as_seen_by(self, *probes: Limits) -> Limits:
        """These limits, but where the probes looked, the best of theirs."""
        seen = Limits(self.threads, self.flops, {})
        for probed in probes:
            seen.raise_to(Limits(probed.threads, {}, probed.bandwidth))
        return replace(self, bandwidth={**self.bandwidth, **seen.bandwidth})

    def to_json(self) -> dict[str, object]:
        return {"threads": self.threads, "flops": self.flops, "bandwidth": self.bandwidth}


_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN = {1: 32 << 10, 2: 1 << 20, 3: 8 << 20}


def _cache_bytes(level: int) -> int:
    """As the kernel tells; sysconf's third level was ten times too large on a guest of an EPYC."""
    for cache in _CACHES.glob("index*"):
        kind = (cache / "type").read_text().strip()
        if int((cache / "level").read_text()) == level and kind != "Instruction":
            return int((cache / "size").read_text().strip().removesuffix("K")) << 10
    return _UNKNOWN[level]


def working_sets(threads: int) -> dict[str, int]:
    """Bytes for each thread: half of each cache, then past it in steps, then memory.

    The last cache is shared by all threads, and by other guests of the machine.
    """
    second, last = _cache_bytes(2), _cache_bytes(3) // threads
    past = {f"{times} × L3": times * last for times in (1, 2, 4)}
    return {
        "L1": _cache_bytes(1) // 2,
        "L2": second // 2,
        **({"2 × L2": 2 * second} if 4 * second < last else {}),
        "L3": last // 2,
        **{name: size for name, size in past.items() if size < MEMORY_BYTES},
        "memory": MEMORY_BYTES,
    }


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


def _measure_now(threads: int, tries: int, sets: dict[str, int]) -> Limits:
    arguments = [f"{name}={size}" for name, size in sets.items()]
    command = [_program(), str(threads), str(tries), *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return Limits(**json.loads(run.stdout))


@functools.cache
def measure(threads: int, tries: int = TRIES) -> Limits:
    """The limits, some fifteen seconds when they are first asked for.

    Raises:
        RuntimeError: there is no C compiler.
        subprocess.CalledProcessError: it failed.
    """
    return _measure_now(threads, tries, working_sets(threads))


def probe(limits: Limits, sizes: Sequence[int]) -> Limits:
    """What memory and the shared caches do now with so many bytes; the limits are raised to it.

    Sets that fit into the cores' own caches are left out: nobody else has a part in those.
    """
    own = 2 * _cache_bytes(2)
    sets = {f"{size / 1e6:.4g} MB": size // limits.threads for size in sizes}
    shared = {name: size for name, size in sets.items() if size > own}
    if not shared:
        return Limits(limits.threads, {}, {})
    seen = _measure_now(limits.threads, _PROBE_TRIES, shared)
    limits.raise_to(seen)
    return seen
