"""Builds and runs the C++ tests, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_native

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake to build the C++ tests with")
def test_cpu_isas(tmp_path: Path) -> None:
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Debug",  # the sanitizers make an optimizing build take minutes
        "-DQLORA_BUILD_TESTS=ON",
        "-DQLORA_SANITIZE=ON",
    ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *generator, *options],
        ["cmake", "--build", str(tmp_path), "--target", "test_cpu_isas", "--parallel", "2"],
        [str(tmp_path / "test_cpu_isas")],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    for isa in qlora_native.available_isas():
        assert f"{isa}: " in run.stdout
