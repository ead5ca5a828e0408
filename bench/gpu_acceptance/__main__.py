"""Runs the stages, one after another, and writes the report."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from typing import Any

from bench.gpu_acceptance import report
from bench.gpu_acceptance.setting import ROOT, Setting, add_arguments, of_arguments


@dataclass(frozen=True)
class Stage:
    """A module of this package; it has passed where it ends with 0 within its seconds."""

    name: str
    seconds: int
    what: str


# 600 seconds together. `build` comes first: the others run what it made.
STAGES = (
    Stage("build", 140, "builds for this card alone, into a folder of its own"),
    Stage("sass", 30, "the compiler's report and the machine code, for this card"),
    Stage("tests", 110, "the op tests, the same files, with the ops on the device"),
    Stage("sanitize", 70, "compute-sanitizer over every op (the emulator checks by itself)"),
    Stage("microbench", 110, "ours and the peers, as fractions of the measured limits"),
    Stage("train", 60, "a training step of a stack of layers in an 8B model's shapes"),
    Stage("paging", 30, "paged optimizers: all state resident, and all of it on the host"),
    Stage("tune", 50, "every way of the product; where the shipped table is not the fastest"),
)


def run_stage(stage: Stage, setting: Setting) -> dict[str, Any]:
    """How it ended. Its output goes into a log, its processes end with it."""
    command = [sys.executable, "-m", f"bench.gpu_acceptance.{stage.name}", *setting.arguments()]
    log = setting.folder / f"{stage.name}.log"
    setting.result(stage.name).unlink(missing_ok=True)
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=setting.environment(), stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(stage.seconds)
            outcome = "passed" if code == 0 else f"failed (exit status {code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"failed: not done within {stage.seconds} s"
    tail = (
        "" if outcome == "passed" else "\n".join(log.read_text(errors="replace").split("\n")[-25:])
    )
    seconds = round(time.monotonic() - begin, 1)
    return {"outcome": outcome, "seconds": seconds, "what": stage.what, "log_tail": tail}


def unpack_peer(setting: Setting) -> None:
    if setting.bitsandbytes is not None:
        with zipfile.ZipFile(setting.bitsandbytes) as wheel:
            wheel.extractall(setting.folder / "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", action="append", choices=[s.name for s in STAGES], default=[])
    add_arguments(parser)
    args = parser.parse_args()
    setting = of_arguments(args)
    setting.folder.mkdir(parents=True, exist_ok=True)
    unpack_peer(setting)
    state_file = setting.folder / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    for stage in STAGES:
        done = state.get(stage.name, {}).get("outcome") == "passed"
        if stage.name in args.stage or (not args.stage and not done):
            print(f"{stage.name}: {stage.what}", flush=True)
            state[stage.name] = run_stage(stage, setting)
            print(f"  {state[stage.name]['outcome']}, {state[stage.name]['seconds']} s", flush=True)
            state_file.write_text(json.dumps(state, indent=1))
            report.write(setting, state)
    print(setting.folder / "report.md")
    failed = [name for name, ended in state.items() if ended["outcome"] != "passed"]
    raise SystemExit(f"not passed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
