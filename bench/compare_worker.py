"""Times ours of the case that it is told, whenever it is told to: bench.compare's other process.

It reads a command a line from stdin and answers each with a line of JSON on stdout:

    package     ->  where the package lies that is timed: the first on PYTHONPATH
    case NAME   ->  null, or the error that kept the case from being prepared
    time        ->  seconds a call, the best of a few samples

The benchmarks are this checkout's.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from typing import TextIO

import torch

import qlora_native
from bench.case import OURS, Case, Tier
from bench.harness import calls_per_sample, sample
from bench.section import all_cases

SECONDS_PER_SAMPLE = 0.01
SECONDS_PER_TURN = 0.2


def _prepare(case: Case) -> Callable[[], float]:
    call = case.contenders[OURS]()
    call()  # page faults and tables
    calls = calls_per_sample(call, SECONDS_PER_SAMPLE)
    samples = max(2, min(10, round(SECONDS_PER_TURN / (calls * sample(call, calls)))))
    return lambda: min(sample(call, calls) for _ in range(samples))


def serve(cases: dict[str, Case], commands: TextIO, answers: TextIO) -> None:
    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    timed: Callable[[], float] | None = None
    for line in commands:
        command, _, name = line.strip().partition(" ")
        if command == "package":
            answer(qlora_native.__file__)
        elif command == "case":
            timed = None
            gc.collect()
            try:
                timed = _prepare(cases[name])
            except Exception as error:
                # An older commit may lack an op: compare tells, and goes on.
                answer(f"{type(error).__name__}: {error}")
            else:
                answer(None)
        elif command == "time" and timed is not None:
            answer(timed())
        else:
            raise ValueError(f"command must be package, case NAME, or time after it, got {line!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--isa", required=True, help="an instruction set, or default")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.isa != "default":
        qlora_native.force_isa(args.isa)
    gc.disable()
    serve({case.name: case for _, case in all_cases(Tier.FULL, args.quick)}, sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
