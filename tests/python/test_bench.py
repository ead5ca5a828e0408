"""Every benchmark runs, on tiny shapes, and the report of them is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler for bench/limits.c")
def test_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.report", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert len(report["sections"]) == len(BENCHES)
    for level in ("L1", "L2", "memory"):
        assert report["limits"]["bandwidth"][level]["copy"] > 1e8
    assert report["limits"]["flops"]["scalar"] > 1e8
    markdown = (tmp_path / "benchmarks.md").read_text()
    for title in report["sections"]:
        assert f"## {title}" in markdown
