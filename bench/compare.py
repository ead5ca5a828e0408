"""Is B slower than A? Two commits' kernels, built, and timed side by side on this machine.

    python -m bench.compare main HEAD                     # ours of the cases of `pytest bench`
    python -m bench.compare v0.1.0 HEAD --only "M=1," --isa avx2 --threads 1
    python -m bench.compare main HEAD --full --only "forward"

Both commits run this checkout's benchmarks, the default subset in some five minutes. Two processes,
one for each commit, take turns A B B A, case by case, and each gives its best time: what disturbs a
timing only adds to it. Then two new ones do it again, for a process can be lucky in how its memory
lies, and neighbours on the machine come and go by the second: a pair of processes is one pair of
times, and the interval is over these. Exit code: 0, no case is slower; 1, one is, by more than the
threshold and by more than its 95 % interval; 2, something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import paired, revisions
from bench.case import Tier
from bench.section import all_cases
from bench.tables import SLOWER, seconds

Pair = tuple[float, float]


class Worker:
    """A process that times cases with one build of the package."""

    def __init__(self, python: Path, options: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare_worker", *options], cwd=revisions.ROOT, text=True,
            env={**os.environ, "PYTHONPATH": str(python)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, command: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # the missing answer tells
            print(command, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended at {command!r}")
        return json.loads(answer)

    def check_package(self, python: Path) -> None:
        """That it times the package that lies there."""
        package = Path(self.ask("package"))
        if not package.is_relative_to(python):
            raise RuntimeError(f"the worker was to time the package in {python}, not {package}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


@dataclass
class Comparison:
    """One case: its pairs of seconds, or why there are none."""

    name: str
    pairs: list[Pair] = field(default_factory=list)
    error: str | None = None


def _take_turns(a: Worker, b: Worker, rounds: int) -> Pair:
    """The best of A and of B, in turns A B B A."""
    times: dict[Worker, list[float]] = {a: [], b: []}
    for worker in [a, b, b, a] * rounds:
        times[worker].append(worker.ask("time"))
    return min(times[a]), min(times[b])


def compare(
    pythons: tuple[Path, Path], names: Sequence[str], options: Sequence[str],
    processes: int, rounds: int,
) -> list[Comparison]:  # fmt: skip
    """A pair of times for every case from each pair of processes."""
    comparisons = [Comparison(name) for name in names]
    for process in range(processes):
        print(f"  processes {process + 1} of {processes}", file=sys.stderr, flush=True)
        with Worker(pythons[0], options) as a, Worker(pythons[1], options) as b:
            for worker, python in zip((a, b), pythons, strict=True):
                worker.check_package(python)
            for comparison in comparisons:
                for letter, worker in (("A", a), ("B", b)):
                    if error := worker.ask(f"case {comparison.name}"):
                        comparison.error = f"{letter}: {error}"
                if comparison.error is None:
                    comparison.pairs.append(_take_turns(a, b, rounds))
    return comparisons


def table(comparisons: Sequence[Comparison], threshold: float) -> tuple[str, bool]:
    """The Markdown, and whether any case is slower."""
    lines = ["| case | A | B | B / A | 95 % interval | |", "|---|---:|---:|---:|---:|---|"]
    any_slower = False
    for comparison in comparisons:
        if comparison.error is not None:
            lines.append(f"| {comparison.name} | | | | | {comparison.error} |")
            continue
        ratio = paired.ratio(comparison.pairs)
        slower = ratio.slower(threshold)
        any_slower |= slower
        verdict = f"slower {SLOWER}" if slower else "faster" if ratio.faster(threshold) else ""
        best_a, best_b = (min(side) for side in zip(*comparison.pairs, strict=True))
        lines.append(
            f"| {comparison.name} | {seconds(best_a)} | {seconds(best_b)} | {ratio.value:.3f} "
            f"| {ratio.low:.3f} to {ratio.high:.3f} | {verdict} |"
        )
    return "\n".join(lines), any_slower


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("a", metavar="REV_A")
    parser.add_argument("b", metavar="REV_B")
    parser.add_argument("--only", action="append", default=[], help="cases with this in the name")
    parser.add_argument("--full", action="store_true", help="out of all cases")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it all run?")
    parser.add_argument("--isa", default="default", help="force both to this instruction set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=10, help="pairs of them (default 10)")
    parser.add_argument("--rounds", type=int, default=2, help="A B B A in each (default 2)")
    parser.add_argument("--threshold", type=float, default=0.03, help="(default 0.03)")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    tier = Tier.FULL if args.full else Tier.CORE
    names = [case.name for _, case in all_cases(tier, args.quick)]
    names = [name for name in names if not args.only or any(part in name for part in args.only)]
    if not names:
        print(f"no case has {' or '.join(args.only)} in its name", file=sys.stderr)
        return 2
    options = [f"--threads={args.threads}", f"--isa={args.isa}", *(["--quick"] * args.quick)]
    try:
        commits = [revisions.resolve(revision) for revision in (args.a, args.b)]
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare")))
            built = []
            for letter, commit in zip("AB", commits, strict=True):
                print(f"building {letter}, {commit}", file=sys.stderr, flush=True)
                tree = stack.enter_context(revisions.worktree(commit, folder / letter))
                built.append(revisions.build(tree))
            comparisons = compare((built[0], built[1]), names, options, args.processes, args.rounds)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    text, any_slower = table(comparisons, args.threshold)
    print(f"A = {commits[0]}, B = {commits[1]}, {args.threads} threads, ISA {args.isa}\n\n{text}")
    return 1 if any_slower else 0


if __name__ == "__main__":
    sys.exit(main())
