"""FLOP/s against arithmetic intensity, under the roofs that were measured in the same run.

One point for each row with FLOPs: its colour tells the instruction set, its marker the op.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.case import OURS
from bench.chart_style import (
    INK,
    RULE,
    colour_of,
    new_figure,
    plain_logarithmic,
    save,
    where_and_when,
)
from bench.limits import ANY

_MARKERS = "osD^vP*X"
_GROUNDS = {"memory": "-", "L3": "--", "L2": ":"}
_SAME = 1.03  # rates that lie closer together are one roof


def draw(rows: list[dict[str, Any]], report: dict[str, Any], folder: Path) -> Path:
    rows = [row for row in rows if row["flops"]]
    figure, axes = new_figure(9.5, 5.6, f"Roofline: {where_and_when(report)}")
    intensities = [_intensity(row) for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 2
    handles = _roofs(axes, report["limits"], left, right)
    handles += _points(axes, rows)
    plain_logarithmic(axes, axes.xaxis)
    plain_logarithmic(axes, axes.yaxis)
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOPs for each byte that must be moved", color=INK, fontsize=9)
    axes.set_ylabel("GFLOP/s, best", color=INK, fontsize=9)
    axes.grid(color=RULE, lw=0.6)
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, folder / "roofline.png")


def _intensity(row: dict[str, Any]) -> float:
    return float(row["flops"] / (row["read_bytes"] + row["write_bytes"]))


def _roofs(axes: Axes, limits: dict[str, Any], left: float, right: float) -> list[Line2D]:
    groups: list[tuple[float, list[str]]] = []
    for isa, rate in sorted(limits["flops"].items(), key=lambda item: item[1]):
        if groups and rate < groups[-1][0] * _SAME:
            groups[-1][1].append(isa)
        else:
            groups.append((rate, [isa]))
    for rate, isas in groups:
        axes.axhline(rate / 1e9, color=INK, lw=1.2, alpha=0.6)
        axes.annotate(
            f"{', '.join(isas)}: {rate / 1e9:.0f} GFLOP/s", (right, rate / 1e9), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=8, color=INK,
        )  # fmt: skip
    top = groups[-1][0]
    handles = []
    for level, style in _GROUNDS.items():
        if level not in limits["bandwidth"]:
            continue
        bandwidth = max(limits["bandwidth"][level].get(kind, 0.0) for kind in ANY)
        ridge = max(top / bandwidth, left)
        (line,) = axes.plot(
            [left, ridge], [left * bandwidth / 1e9, ridge * bandwidth / 1e9], style,
            color=INK, lw=1.2, label=f"{level}: {bandwidth / 1e9:.0f} GB/s",
        )  # fmt: skip
        handles.append(line)
    return handles


def _op(row: dict[str, Any]) -> str:
    """A case's name begins with it (bench/case.py)."""
    name: str = row["case"]
    return name.split(",")[0]


def _points(axes: Axes, rows: list[dict[str, Any]]) -> list[Line2D]:
    """The points, and what the legend says of their markers and colours."""
    markers = dict(zip(dict.fromkeys(_op(row) for row in rows), _MARKERS * 4, strict=False))
    for row in rows:
        rate = row["flops"] / row["contenders"][OURS]["best_seconds"] / 1e9
        axes.plot(
            _intensity(row), rate, markers[_op(row)], color=colour_of(row["isa"]), ms=6,
            markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    isas = dict.fromkeys(row["isa"] for row in rows)
    return [
        *(Line2D([], [], ls="", marker=m, color=INK, label=op) for op, m in markers.items()),
        *(Line2D([], [], ls="", marker="s", color=colour_of(i), label=f"ours, {i}") for i in isas),
    ]
