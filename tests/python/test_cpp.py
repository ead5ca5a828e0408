"""Builds and runs the C++ tests, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qlora_native
from cpp_build import build, run, run_tests


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake to build the C++ tests with")
def test_cpu_paths(tmp_path: Path) -> None:
    # The sanitizers make an optimizing build take minutes.
    build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", "-DQLORA_SANITIZE=ON")
    for ran in run_tests(tmp_path):
        assert ran == qlora_native.build_info()["isas_available"]
    assert "0 failures" in run(tmp_path / "tests/cpp/test_paging_file")
