"""bench.gpu_acceptance on the emulator: the script that a GPU machine runs, with small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from bench.gpu_acceptance import peers

import qlora_native
from qlora_native import ops, tuned_ways

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


def _wheel_of_bitsandbytes(path: Path) -> None:
    """As much of the installed one as a CPU needs: its wheel carries every GPU's library."""
    package = Path(pytest.importorskip("bitsandbytes").__file__).parent
    files = [*package.rglob("*.py"), package / "libbitsandbytes_cpu.so"]
    with zipfile.ZipFile(path, "w") as wheel:
        for file in files:
            wheel.write(file, file.relative_to(package.parent))


def test_the_peers_stand_beside_ours(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes.whl"
    _wheel_of_bitsandbytes(wheel)
    ran = _run(tmp_path, "--stage", "microbench", "--bitsandbytes", str(wheel))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads((tmp_path / "microbench.json").read_text())["rows"]
    for row in rows:
        assert row["measured"]["bitsandbytes"].get("seconds", 0) > 0, row
        for name, of in row["measured"].items():
            faster = of["seconds"] < row["measured"]["ours"]["seconds"]
            assert (name in row["slower_than"]) == faster, row
    for rule, peer in (("AdamW", "AdamW"), ("Lion", "AdamW"), ("SGD", "SGD")):
        steps = [row for row in rows if row["name"].startswith(rule)]
        assert len(steps) == 2
        assert all(f"torch's fused {peer}" in row["measured"] for row in steps)
    assert "| slower than |" in (tmp_path / "report.md").read_text()


def test_the_peers_do_the_same_work() -> None:
    pytest.importorskip("bitsandbytes")
    n, k, m = 64, 128, 24
    torch.manual_seed(0)
    dense = torch.randn(n, k).mul_(0.05).bfloat16()
    x, grad = (torch.randn(m, size).bfloat16() for size in (k, n))
    a, b = torch.randn(16, k) * 0.05, torch.randn(n, 16) * 0.05
    packed, absmax = ops.quantize_4bit(dense)
    weight = (packed, *ops.quantize_scales(absmax))
    _, u = ops.qlora_linear(x, *weight, 64, "nf4", None, a, b, 2.0)
    pairs = [
        (peers.linear(dense, 1, x), ops.linear_4bit(x, *weight, n)),
        (peers.input_gradient(dense, 1, grad), ops.linear_4bit_backward_input(grad, *weight, k)),
    ]
    adapter = peers.Adapter(a, b, 2.0)
    (step,) = peers.lora(dense, 1, x, grad, adapter)
    dx, da, db, _ = ops.qlora_linear_backward(grad, x, u, *weight, 64, "nf4", a, b, 2.0)
    got = [(calls[0](), expected) for calls, expected in pairs]
    for theirs, expected in [*got, *zip(step(), (dx, da, db), strict=True)]:
        error = (theirs.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2**-6  # bf16 outputs and inner values


def test_the_stages_fit_into_ten_minutes() -> None:
    assert sum(stage.seconds for stage in acceptance.STAGES) <= 600


def test_a_stage_that_is_late_ends_and_loses_nothing_of_the_others(tmp_path: Path) -> None:
    setting = acceptance.Setting(tmp_path, emulate=True, bitsandbytes=None)
    ended = acceptance.run_stage(acceptance.Stage("every_op", 0, "late"), setting)
    assert ended["outcome"] == "failed: not done within 0 s"
    ended = acceptance.run_stage(acceptance.Stage("no_such", 60, "missing"), setting)
    assert ended["outcome"].startswith("failed (exit status") and "no_such" in ended["log_tail"]
