"""bench.gpu_acceptance on the emulator: the script that a GPU machine runs, with small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_native
from qlora_native import tuned_ways

pytest.importorskip("qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON")
acceptance = pytest.importorskip("bench.gpu_acceptance.__main__")

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_acceptance", "--emulate", "--out", str(folder)]
    package = str(Path(qlora_native.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_every_stage_passes_and_is_reported(tmp_path: Path) -> None:
    ran = _run(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    names = [stage.name for stage in acceptance.STAGES]
    assert list(report["stages"]) == names and list(report["results"]) == names
    counts = report["results"]["tests"]["counts"]
    assert counts["tests"] - counts["skipped"] > 20 and counts["failures"] == 0
    for row in report["results"]["microbench"]["rows"]:
        assert row["measured"]["ours"]["seconds"] > 0, row
    written = (tmp_path / "report.md").read_text()
    assert "linear_4bit" in written and "nothing here says anything about a GPU" in written
    again = _run(tmp_path)  # what has passed is not run again
    assert again.returncode == 0 and again.stdout.strip() == str(tmp_path / "report.md")


def test_the_tuned_table_lies_beside_the_report(tmp_path: Path) -> None:
    ran = _run(tmp_path, "--stage", "tune")
    assert ran.returncode == 0, ran.stdout + ran.stderr + (tmp_path / "tune.log").read_text()
    result = json.loads((tmp_path / "tune.json").read_text())
    table = tuned_ways.read(tmp_path / result["table"], tuned_ways.Card("emulator", 90))
    assert len(table) == result["cases"] == 4 and not result["no_way"]
    assert [m.disagrees for m in table].count(True) == len(result["disagree"])
    assert "4 cases" in (tmp_path / "report.md").read_text()


def test_paged_steps_have_the_plain_steps_bits(tmp_path: Path) -> None:
    ran = _run(tmp_path, "--stage", "paging", "--oversubscribe")
    assert ran.returncode == 0, ran.stdout + ran.stderr + (tmp_path / "paging.log").read_text()
    result = json.loads((tmp_path / "paging.json").read_text())
    for pager in ("managed", "staged"):
        assert result["resident"][pager]["resident"] == result["resident"]["bytes"]
        assert result["resident"][pager]["in_per_second"] == 0
        assert result["on the host"][pager]["in_per_second"] > 0
        assert result["resident"][pager]["equal"] and result["on the host"][pager]["equal"]
    assert result["oversubscribed"]["bytes"] > result["oversubscribed"]["free"]
    assert "| on the host | staged |" in (tmp_path / "report.md").read_text()


def test_the_stages_fit_into_ten_minutes() -> None:
    assert sum(stage.seconds for stage in acceptance.STAGES) <= 600


def test_a_stage_that_is_late_ends_and_loses_nothing_of_the_others(tmp_path: Path) -> None:
    setting = acceptance.Setting(tmp_path, emulate=True, bitsandbytes=None)
    ended = acceptance.run_stage(acceptance.Stage("every_op", 0, "late"), setting)
    assert ended["outcome"] == "failed: not done within 0 s"
    ended = acceptance.run_stage(acceptance.Stage("no_such", 60, "missing"), setting)
    assert ended["outcome"].startswith("failed (exit status") and "no_such" in ended["log_tail"]
