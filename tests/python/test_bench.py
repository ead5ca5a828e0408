"""Every benchmark runs, on tiny shapes, and the report of them is written, with its charts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench import bench_threads, charts, record
from bench.bench_linear import cases
from bench.case import OURS, Tier
from bench.harness import Budget, median_ratio, time_contenders
from bench.section import Section, all_cases, names

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler for bench/limits.c")
def test_report(tmp_path: Path) -> None:
    # One thread: on tiny shapes two spend their time in waiting for each other.
    options = ["--quick", "--threads=1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "bench.report", *options]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert len(report["sections"]) == len(names())
    assert all(kept["made"]["commit"] for kept in report["sections"].values())
    for level in ("L1", "L2", "L3", "memory"):
        assert report["limits"]["bandwidth"][level]["copy"] > 1e8
    assert report["limits"]["flops"]["scalar"] > 1e8
    markdown = (tmp_path / "benchmarks.md").read_text()
    for title in report["sections"]:
        assert f"## {title}" in markdown

    drawn = charts.draw(report, tmp_path / "again")
    assert {"Roofline", "4-bit linear: over torch"} <= drawn.keys()
    for title, path in drawn.items():
        assert path.read_bytes().startswith(PNG)
        assert f"![{title}](images/{path.name})" in markdown
        assert (tmp_path / "images" / path.name).exists()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler for bench/limits.c")
def test_threads_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [next(pair for pair in all_cases(Tier.CORE, quick=True) if pair[1].op == "forward")]
    monkeypatch.setattr(bench_threads, "all_cases", lambda tier, quick: cases)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (row,) = bench_threads.section(quick=True).data
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert row["best_seconds"].keys() == {"1", "2"}
    assert row["faster"] > 0 and row["limits_ratio"] > 0


def test_cases_have_names_of_their_own() -> None:
    found = [case.name for _, case in all_cases(Tier.FULL)]
    assert len(found) == len(set(found))


def test_linear_cases_cover_what_they_promise() -> None:
    full = list(cases(quick=False))
    squares = {(c.m, str(c.dtype)) for c in full if c.op == "forward" and c.where == "4096 × 4096"}
    assert {m for m, _ in squares} >= {1, 4, 16, 64, 256, 512, 1024, 4096}
    assert {dtype for _, dtype in squares} == {"torch.float32", "torch.bfloat16", "torch.float16"}
    for model in ("SmolLM2-135M", "Llama-3-8B", "Qwen2.5-7B"):
        assert any(model in c.where for c in full if c.tier <= Tier.REPORT)


def test_contenders_take_turns() -> None:
    prepared: list[str] = []
    called: list[str] = []
    contenders = {name: (lambda name=name: called.append(name)) for name in "abc"}
    budget = Budget(rounds=4, seconds=0.0, max_rounds=4, seconds_per_sample=0.0)
    samples = time_contenders(contenders, budget, prepared.append)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [called[i : i + 3] for i in range(len(called) - 12, len(called), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert prepared[-12:] == called[-12:]


def test_a_hopeless_peer_is_timed_once() -> None:
    contenders = {OURS: lambda: time.sleep(0.02), "peer": lambda: time.sleep(0.02), "fast": int}
    budget = Budget(rounds=3, seconds=0.0, seconds_per_sample=0.0, hopeless=0.01)
    samples = time_contenders(contenders, budget)
    assert {name: len(times) for name, times in samples.items()} == {OURS: 3, "peer": 1, "fast": 3}
    assert 0.5 < median_ratio(samples["peer"], samples[OURS]) < 2


def test_budget_ends() -> None:
    budget = Budget(rounds=7, seconds=3.0, max_rounds=60, patience=15.0)
    assert budget.goes_on(rounds=2, seconds=100.0)  # three, however long they take
    assert not budget.goes_on(rounds=3, seconds=15.0)
    assert budget.goes_on(rounds=6, seconds=14.0)
    assert not budget.goes_on(rounds=7, seconds=3.0)
    assert budget.goes_on(rounds=59, seconds=2.9)
    assert not budget.goes_on(rounds=60, seconds=0.1)
    assert not budget.goes_on(rounds=7, seconds=0.1, spread=budget.settled)
    assert budget.goes_on(rounds=6, seconds=0.1, spread=0.0)
    assert budget.once_is_enough(peer=0.4, ours=0.03)
    assert not budget.once_is_enough(peer=0.4, ours=0.05)


def test_a_report_is_made_section_by_section(tmp_path: Path) -> None:
    path, machine, order = (
        tmp_path / "benchmarks.json",
        {"processor": "P", "torch": "2.13"},
        list("abc"),
    )
    report = record.load(path, machine)
    for title in "cab":
        made = {"date": f"2026-11-2{order.index(title)} 10:00 UTC"}
        record.put(report, Section(title, title.upper(), [title]), made, order)
    record.save(report, path)

    report = record.load(path, machine)
    record.put(report, Section("b", "B", ["anew"]), {"date": "2026-11-25 10:00 UTC"}, order)
    assert list(report["sections"]) == order
    assert [record.data(report, title) for title in order] == [["a"], ["anew"], ["c"]]
    assert record.days(report) == "2026-11-20 and 2026-11-22 and 2026-11-25"
    assert record.load(path, {**machine, "torch": "2.14"})["sections"] == {}


def test_the_committed_report_can_be_drawn_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.charts", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*.png")} <= {
        path.name for path in (ROOT / "docs" / "images").glob("*.png")
    }
