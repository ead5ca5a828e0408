"""Builds the CPU backend with its C++ tests, for this processor or another, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("test_cpu_quantize", "test_cpu_linear", "test_cpu_optimizers", "test_cpu_out_of_memory")


def run(*command: str | Path, timeout: int = 600, **environment: str) -> str:
    """What the command printed; its end is shown where it failed."""
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def build(folder: Path, *options: str) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ("-DQLORA_CORE_ONLY=ON", "-DQLORA_WERROR=ON", *options)
    run("cmake", "-S", ROOT, "-B", folder, *generator, *options)
    run("cmake", "--build", folder, "--parallel", "2")


def run_tests(folder: Path, *emulator: str, **environment: str) -> list[list[str]]:
    """The instruction sets on which each of the tests ran."""
    ran = []
    for test in TESTS:
        printed = run(*emulator, folder / "tests/cpp" / test, **environment)
        ran.append(re.findall(r"^(\w+): \d+ cases$", printed, re.MULTILINE))
    return ran
