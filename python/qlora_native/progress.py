"""What a run shows while it runs: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from qlora_native.metrics import current_rss

# Seconds between two plain lines.
_LINE_INTERVAL = 10.0


class Reporter:
    """The interface, and the reporter that shows nothing. Steps count from 1."""

    def start(self, steps: int, done: int) -> None:
        """Training begins at step `done` of `steps`."""

    def step(self, record: dict[str, Any]) -> None:
        """A step was taken; the record is a line of metrics.jsonl."""

    def evaluating(self, done: int, batches: int) -> None:
        """`done` of `batches` of an evaluation are through."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """An evaluation is through."""

    def say(self, message: str) -> None:
        """Something the user should know."""

    def close(self) -> None:
        """Training has ended, well or not."""


class PlainReporter(Reporter):
    """Lines, at most one every ten seconds: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._steps = self._done = 0
        self._began = self._last = 0.0

    def start(self, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        self._began = time.monotonic()
        self._last = -_LINE_INTERVAL

    def step(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        step = int(record["step"])
        if now - self._last < _LINE_INTERVAL and step != self._steps:
            return
        self._last = now
        left = (now - self._began) / (step - self._done) * (self._steps - step)
        self.say(f"step {step}/{self._steps}  {describe(record)}  {_clock(left)} left")

    def evaluated(self, record: dict[str, Any]) -> None:
        self.say(f"step {record['step']}/{self._steps}  {describe_evaluation(record)}")

    def say(self, message: str) -> None:
        print(message, file=self._stream, flush=True)


class RichReporter(Reporter):
    """A progress bar with loss, learning rate, tokens a second, memory and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(highlight=False),
            expand=True,
        )

    def start(self, steps: int, done: int) -> None:
        self._training = self._bar.add_task("training", total=steps, completed=done, numbers="")
        self._evaluation = self._bar.add_task("evaluating", total=1, visible=False, numbers="")
        self._bar.start()

    def step(self, record: dict[str, Any]) -> None:
        self._bar.update(self._training, completed=record["step"], numbers=describe(record))

    def evaluating(self, done: int, batches: int) -> None:
        self._bar.update(self._evaluation, completed=done, total=batches, visible=done < batches)

    def evaluated(self, record: dict[str, Any]) -> None:
        self.say(f"step {record['step']}  {describe_evaluation(record)}")

    def say(self, message: str) -> None:
        self._bar.console.print(message, markup=False)

    def close(self) -> None:
        self._bar.stop()


def make_reporter(stream: TextIO | None = None) -> Reporter:
    """A bar if standard output is a terminal (and rich is installed), else lines."""
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            return RichReporter()
        except ImportError:
            pass
    return PlainReporter(stream)


def describe(record: dict[str, Any]) -> str:
    text = (
        f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
        f"{record['tokens_per_second']:.0f} tokens/s  {current_rss() / 2**30:.2f} GiB"
    )
    if record.get("optim_bytes"):
        resident, whole = record["optim_resident"] / 2**20, record["optim_bytes"] / 2**20
        text += f"  state {resident:.0f}/{whole:.0f} MiB in memory"
    return text


def describe_paging(paging: dict[str, Any]) -> str:
    """What an optimizer's `paging()` came to."""
    if not paging["bytes"]:
        return "none of it is paged: no tensor has --optim-paged-from values"
    moved = paging["moved_in"] + paging["moved_out"]
    return (
        f"{paging['bytes'] / 2**20:.1f} MiB paged ({paging['pager']}), "
        f"{paging['resident'] / 2**20:.1f} MiB of it in memory, {moved / 2**20:.0f} MiB moved, "
        f"waited {paging['waited']:.1f} s"
    )


def describe_evaluation(record: dict[str, Any]) -> str:
    return (
        f"held out: loss {record['eval_loss']:.4f}  perplexity {record['eval_perplexity']:.3f} "
        f"± {record['eval_perplexity_stderr']:.3f}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
