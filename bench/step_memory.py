"""Memory of one learner in a process of its own: python -m bench.step_memory NAME DTYPE [--quick]

Prints JSON, in bytes of resident memory: "loading" (the most until the model is ready), "ready"
(what is held then) and "stepping" (the most in three training steps).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(name: str, dtype: str, quick: bool, threads: int) -> dict[str, int]:
    """Run this file in a fresh process."""
    command = [sys.executable, "-m", "bench.step_memory", name, dtype, f"--threads={threads}"]
    command += ["--quick"] if quick else []
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    result: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return result


def main() -> None:
    from bench.bench_step import make_batch
    from bench.learners import DTYPES, make, model_folder

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    learner = make(args.name, model_folder(args.quick), DTYPES[args.dtype])
    batch = make_batch(args.quick)
    result = {"loading": _status("VmHWM")}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    result["ready"] = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    for _ in range(3):
        learner.step(batch)
    result["stepping"] = _status("VmHWM")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
