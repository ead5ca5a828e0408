"""The regression guard: its statistics, its verdicts, and its other process."""

from __future__ import annotations

import io
import json
import random
import subprocess
from pathlib import Path

import pytest
from bench import compare, paired, revisions
from bench.case import Tier
from bench.compare_worker import serve
from bench.section import all_cases

ROOT = Path(__file__).resolve().parents[2]


def pairs(
    slowdown: float, noise: float, count: int = 24, drift: float = 0.0, seed: int = 0
) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [
        (level * draw.lognormvariate(0, noise), level * slowdown * draw.lognormvariate(0, noise))
        for level in (1.0 + drift * i for i in range(count))
    ]


def test_ratio_of_exact_pairs() -> None:
    ratio = paired.ratio([(1.0, 2.0), (3.0, 6.0), (0.1, 0.2)])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_ratio_does_not_see_drift() -> None:
    """The machine gets three times slower while the pairs are measured."""
    ratio = paired.ratio(pairs(1.1, noise=0.001, drift=0.1))
    assert ratio.value == pytest.approx(1.1, rel=2e-3)
    assert ratio.high - ratio.low < 0.01


def test_ratio_is_symmetric() -> None:
    forth = paired.ratio(pairs(1.2, noise=0.05))
    back = paired.ratio([(b, a) for a, b in pairs(1.2, noise=0.05)])
    assert forth.value == pytest.approx(1 / back.value)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """95 % of the intervals; a bootstrap of ten pairs is a little too narrow, some 90 %."""
    ratios = [paired.ratio(pairs(1.0, 0.1, count=10, seed=seed), seed) for seed in range(200)]
    held = sum(ratio.low <= 1.0 <= ratio.high for ratio in ratios) / len(ratios)
    assert 0.84 <= held <= 0.99


def test_verdict_needs_the_threshold_and_the_interval() -> None:
    assert paired.Ratio(1.10, 1.05, 1.15).slower(0.03)
    assert not paired.Ratio(1.10, 0.99, 1.20).slower(0.03)  # by chance
    assert not paired.Ratio(1.02, 1.01, 1.03).slower(0.03)  # too little
    assert paired.Ratio(0.90, 0.85, 0.95).faster(0.03)
    assert not paired.Ratio(0.99, 0.98, 1.00).faster(0.03)


def test_too_few_pairs() -> None:
    with pytest.raises(ValueError, match="at least 3 pairs, got 2"):
        paired.ratio([(1.0, 1.0)] * 2)


def test_table_tells_what_is_slower_and_what_is_missing() -> None:
    comparisons = [
        compare.Comparison("same", pairs(1.0, noise=0.001)),
        compare.Comparison("worse", pairs(1.2, noise=0.001)),
        compare.Comparison("new op", error="A: AttributeError: no such op"),
    ]
    text, any_slower = compare.table(comparisons, threshold=0.03)
    same, worse, new = text.splitlines()[2:]
    assert any_slower
    assert same.endswith("|  |") and "slower" in worse and "no such op" in new
    assert not compare.table(comparisons[:1], threshold=0.03)[1]


def test_worker_answers_each_command() -> None:
    cases = {case.name: case for _, case in all_cases(Tier.CORE, quick=True)}
    name = next(name for name in cases if name.startswith("dequantize"))
    answers = io.StringIO()
    commands = ["package", "case no such one", f"case {name}", "time", "time"]
    serve(cases, io.StringIO("\n".join(commands)), answers)
    package, missing, prepared, first, second = map(json.loads, answers.getvalue().splitlines())
    assert package.endswith("__init__.py")
    assert missing.startswith("KeyError") and prepared is None
    assert 0 < first < 1 and 0 < second < 1


def test_two_builds_take_turns() -> None:
    """A against itself, in two processes."""
    import qlora_native

    python = Path(qlora_native.__file__).parents[1]
    name = next(c.name for _, c in all_cases(Tier.CORE, quick=True) if c.op == "forward")
    options = ["--threads=1", "--isa=default", "--quick"]
    (comparison,) = compare.compare((python, python), [name], options, processes=2, rounds=1)
    assert comparison.error is None and len(comparison.pairs) == 2


def _is_checkout() -> bool:
    command = ["git", "rev-parse", "--is-inside-work-tree"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.skipif(not _is_checkout(), reason="not a git checkout")
def test_worktree_comes_and_goes(tmp_path: Path) -> None:
    commit = revisions.resolve("HEAD")
    with revisions.worktree(commit, tmp_path / "tree") as folder:
        assert (folder / "CMakeLists.txt").exists()
    assert not folder.exists()
    with pytest.raises(ValueError, match="no such commit: nonsense"):
        revisions.resolve("nonsense")
