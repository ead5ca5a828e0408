"""What the charts have in common: a light ground, and colours that all eyes tell apart.

The colours are Okabe and Ito's (Color Universal Design, 2008).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench import record

INK, RULE, SLOWER = "#333333", "#DDDDDD", "#B30000"
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
ISA_COLOURS = {"avx512bf16": BLUE, "avx512": GREEN, "avx2": ORANGE, "neon": PINK, "scalar": SKY}


def new_figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_axisbelow(True)
    return figure, axes


def plain_logarithmic(axes: Axes, axis: Axis, unit: str = "") -> None:
    """Logarithmic, and labelled 1, 2, 5, 10, not with powers."""
    if axis is axes.xaxis:
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def where_and_when(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['processor']}, {machine['threads']} threads, {record.days(report)}"


def colour_of(isa: str) -> str:
    return ISA_COLOURS.get(isa, INK)
