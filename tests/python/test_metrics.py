"""What a run leaves and shows: metrics, run.json, the plot, plain lines and the bar."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from qlora_native.metrics import (
    MetricsLog,
    current_rss,
    describe_environment,
    peak_rss,
    read_metrics,
    write_run,
)
from qlora_native.plot import plot_loss, smoothed
from qlora_native.progress import PlainReporter, RichReporter, make_reporter


def step(n: int, loss: float = 2.5) -> dict[str, Any]:
    return {
        "step": n, "loss": loss, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "labelled": 10,
    }  # fmt: skip


def evaluation(n: int, loss: float = 2.0, stderr: float = 0.1) -> dict[str, Any]:
    return {
        "step": n, "eval_loss": loss, "eval_loss_stderr": stderr,
        "eval_perplexity": math.exp(loss), "eval_perplexity_stderr": math.exp(loss) * stderr,
    }  # fmt: skip


def test_lines_are_there_as_soon_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(step(1))
        assert read_metrics(path) == [step(1)]
        log.write(step(2))
    assert read_metrics(path) == log.records == [step(1), step(2)]


def test_going_on_drops_what_will_be_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for n in range(1, 6):
            log.write(step(n))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsLog(path, start=3) as log:
        log.write(step(4, loss=1.0))
    assert read_metrics(path) == [step(1), step(2), step(3), step(4, loss=1.0)]


def test_starting_anew_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(step(1))
    with MetricsLog(path) as log:
        pass
    assert read_metrics(path) == []


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_run_describes_the_machine(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", {"machine": describe_environment()})
    machine = json.loads((tmp_path / "run.json").read_text())["machine"]
    assert {"torch", "transformers"} <= machine["packages"].keys()
    assert machine["build"]["isa"] and machine["processor"] and machine["threads"] >= 1


def test_memory() -> None:
    assert 10 * 2**20 < current_rss() <= peak_rss() * 1.01 < 2**40


@pytest.mark.parametrize(
    "records",
    [
        [evaluation(0), *(step(n, 3 - n / 50) for n in range(1, 101)), evaluation(100, 1.2)],
        [evaluation(0, stderr=math.nan)],
        [step(1)],
        [],
    ],
    ids=["whole", "one-evaluation", "one-step", "empty"],
)
def test_plot(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    plot_loss(records, tmp_path / "loss.png", title="tiny")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    assert int.from_bytes(content[16:20], "big") == 1200  # width


def test_smoothing_weighs_by_tokens() -> None:
    assert smoothed([1.0, 2.0, 4.0], [1, 1, 1], 0) == [1.0, 2.0, 4.0]
    assert smoothed([1.0, 2.0, 4.0], [1, 3, 1], 1) == [1.75, 2.2, 2.5]


def test_plain_lines() -> None:
    stream = io.StringIO()
    reporter = make_reporter(stream)
    assert isinstance(reporter, PlainReporter)
    reporter.start(100, 0)
    for n in range(1, 101):
        reporter.step(step(n))
    reporter.evaluated(evaluation(100))
    reporter.close()
    first, last, held_out = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"step 1/100  loss 2\.5000  lr 2\.00e-04  1234 tokens/s  \d\.\d\d GiB  \d:\d\d:\d\d left",
        first,
    )
    assert last.startswith("step 100/100")
    assert held_out == "step 100/100  held out: loss 2.0000  perplexity 7.389 ± 0.739"


def test_bar(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RichReporter()
    reporter.start(2, 0)
    reporter.evaluating(1, 2)
    reporter.evaluating(2, 2)
    reporter.step(step(1))
    reporter.evaluated(evaluation(1))
    reporter.say("Wrote [checkpoint]")
    reporter.close()
    shown = capsys.readouterr().out
    assert "Wrote [checkpoint]" in shown and "perplexity 7.389" in shown
