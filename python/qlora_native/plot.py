"""The loss plot: training loss, each step and smoothed, and the held-out loss with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_native import files

_TRAIN, _HELD_OUT, _INK, _RULE = "#4C72B0", "#C44E52", "#333333", "#DDDDDD"


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draws the records of metrics.jsonl as a PNG; needs matplotlib.

    The smoothed line is a mean over a window of a twentieth of the run, weighted by tokens.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    training = [r for r in records if "loss" in r]
    held_out = [r for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps = [r["step"] for r in training]
        losses = [r["loss"] for r in training]
        weights = [r.get("labelled", 1) for r in training]
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=1)
        smooth = smoothed(losses, weights, window=max(1, len(losses) // 20))
        axes.plot(steps, smooth, color=_TRAIN, linewidth=2, label="training (smoothed)")
    if held_out:
        steps = [r["step"] for r in held_out]
        losses = [r["eval_loss"] for r in held_out]
        errors = [
            e if math.isfinite(e := r.get("eval_loss_stderr") or 0.0) else 0.0 for r in held_out
        ]
        axes.errorbar(
            steps, losses, yerr=errors, color=_HELD_OUT, linewidth=1.5, marker="o", markersize=5,
            capsize=3, label="held out (± standard error)",
        )  # fmt: skip
        for record in (held_out[0], held_out[-1])[: len(held_out)]:
            axes.annotate(
                f"perplexity {math.exp(min(record['eval_loss'], 700)):.3g}",
                (record["step"], record["eval_loss"]),
                textcoords="offset points",
                xytext=(8 if record is held_out[0] else -8, 8),
                ha="left" if record is held_out[0] else "right",
                color=_HELD_OUT,
                fontsize=9,
            )
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats a token)", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.12)
    if title:
        axes.set_title(title, loc="left", color=_INK, fontsize=11)
    if training or held_out:
        axes.legend(frameon=False, loc="upper right")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    files.write_file(path, image.getvalue())


def smoothed(values: Sequence[float], weights: Sequence[float], window: int) -> list[float]:
    """The weighted mean of each value and its neighbours, `window` to each side."""
    result = []
    for i in range(len(values)):
        part = slice(max(0, i - window), i + window + 1)
        total = sum(weights[part])
        pairs = zip(values[part], weights[part], strict=True)
        result.append(sum(v * w for v, w in pairs) / total if total else values[i])
    return result
