"""Stage: compute-sanitizer over every op, where it is installed and takes the device.

The emulator checks each access by itself; there the stage runs the same calls on it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.setting import ROOT, Setting

TOOLS = ("memcheck", "racecheck")
_SECONDS = 30


def sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    beside_nvcc = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(beside_nvcc) if beside_nvcc.exists() else None)


def watch(setting: Setting, prefix: list[str]) -> tuple[str, bool]:
    """What came of it, and whether that is a failure. Every allocation stands by itself."""
    command = [*prefix, sys.executable, "-m", "bench.gpu_acceptance.every_op", *setting.arguments()]
    environment = {**setting.environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done within {_SECONDS} s", True
    print(run.stdout[-4000:], run.stderr[-4000:], flush=True)
    if "Device not supported" in run.stdout + run.stderr:
        return "the tool does not take this device", False
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", run.stdout)
    told = summary[0] if summary else (run.stdout.strip().split("\n") or [""])[-1]
    return told or "it said nothing", run.returncode != 0


def main() -> None:
    setting = settings.of_stage(__doc__)
    tool = None if setting.emulate else sanitizer()
    if setting.emulate:
        runs = {"emulator": watch(setting, [])}
    elif tool is None:
        runs = {"compute-sanitizer": ("not installed", False)}
    else:
        runs = {name: watch(setting, [tool, "--tool", name, "--error-exitcode", "86"])
                for name in TOOLS}  # fmt: skip
    settings.write_result(setting, "sanitize", {name: told for name, (told, _) in runs.items()})
    raise SystemExit(any(failed for _, failed in runs.values()))


if __name__ == "__main__":
    main()
