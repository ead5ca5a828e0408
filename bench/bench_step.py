"""One training step of SmolLM2-135M-Instruct, r = 16 on all linears, 4 rows of 256 tokens.

Ours beside transformers + peft + bitsandbytes and transformers + peft un-quantized, each in fp32
and in bf16, all in one process in shuffled rounds; memory in a process for each (step_memory.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import step_memory
from bench.case import OURS
from bench.harness import SMOKE, Budget, time_contenders
from bench.learners import BITSANDBYTES, DTYPES, UNQUANTIZED, make, model_folder, names
from bench.section import Section
from bench.tables import ratio
from qlora_native.collate import Batch, collate
from qlora_native.data import Example

TITLE = "Training step"
ROUNDS = Budget(rounds=9, seconds=60.0, max_rounds=15, seconds_per_sample=0.0, hopeless=math.inf)


def make_batch(quick: bool) -> Batch:
    """4 × 256 tokens drawn at random, every one of them learned; quick: 2 × 8."""
    rows, length, vocabulary = (2, 8, 256) if quick else (4, 256, 49152)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator).tolist()
    examples = [Example(f"row {i}", tuple(row), tuple(row)) for i, row in enumerate(ids)]
    return collate([[example] for example in examples], pad_id=0, packed=False)


def _dtypes(quick: bool) -> list[str]:
    return ["float32"] if quick else list(DTYPES)


def _seconds(quick: bool, batch: Batch) -> dict[tuple[str, str], list[float]]:
    folder = model_folder(quick)
    learners = {}
    for name in names():
        for dtype in _dtypes(quick):
            learner = make(name, folder, DTYPES[dtype])
            learners[f"{name} {dtype}"] = lambda learner=learner: learner.step(batch)
    samples = time_contenders(learners, SMOKE if quick else ROUNDS)
    return {(key.split()[0], key.split()[1]): seconds for key, seconds in samples.items()}


def _memory(
    keys: list[tuple[str, str]], quick: bool, threads: int
) -> dict[tuple[str, str], dict[str, int]]:
    """One process after the other; for the smoke test all at once."""

    def measure(key: tuple[str, str]) -> dict[str, int]:
        print(f"  memory: {', '.join(key)}", file=sys.stderr, flush=True)
        return step_memory.measure(*key, quick, threads)

    with ThreadPoolExecutor(len(keys) if quick else 1) as pool:
        return dict(zip(keys, pool.map(measure, keys), strict=True))


def section(quick: bool) -> Section:
    batch = make_batch(quick)
    dtypes = _dtypes(quick)
    threads = torch.get_num_threads()
    memory = _memory([(name, dtype) for name in names() for dtype in dtypes], quick, threads)
    print("  time", file=sys.stderr, flush=True)
    seconds = _seconds(quick, batch)

    median = {key: statistics.median(samples) for key, samples in seconds.items()}
    best_dtype = {
        name: min(dtypes, key=lambda dtype, name=name: median[name, dtype]) for name in names()
    }
    ours = (OURS, best_dtype[OURS])

    def speedup(key: tuple[str, str]) -> float:
        pairs = zip(seconds[key], seconds[ours], strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    rows = [
        f"| {name} | {dtype} | {median[name, dtype]:.3f} s | {min(seconds[name, dtype]):.3f} s "
        f"| {batch.tokens / median[name, dtype]:.0f} "
        f"| {'' if (name, dtype) == ours else ratio(speedup((name, dtype)))} "
        f"| {memory[name, dtype]['stepping'] / 2**20:.0f} MiB "
        f"| {memory[name, dtype]['stepping'] / memory[ours]['stepping']:.2f}× "
        f"| {memory[name, dtype]['loading'] / 2**20:.0f} MiB |"
        for name in names()
        for dtype in dtypes
    ]
    lines = [
        f"SmolLM2-135M-Instruct, r = 16 on all linears, {batch.tokens} tokens, {threads} threads. "
        f"*Ours* in the ratios is {ours[1]}; memory is resident, the most in three steps, and the "
        "most while loading, each in a process of its own.",
        "",
        "| | dtype | median | best | tokens/s | ours is faster | memory | to ours | loading |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]
    for name in (BITSANDBYTES, UNQUANTIZED):
        if name in best_dtype:
            key = (name, best_dtype[name])
            lines += ["", f"Against {name} in its best dtype ({key[1]}): {ratio(speedup(key))}."]
    data = {
        f"{name} {dtype}": {
            "seconds": seconds[name, dtype],
            "speedup_of_ours": speedup((name, dtype)),
            "memory": memory[name, dtype],
        }
        for name in names()
        for dtype in dtypes
    }
    return Section(TITLE, "\n".join(lines), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(section(args.quick).markdown)
