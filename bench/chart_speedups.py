"""How many times faster ours is than one peer: a bar a row, and 1 is the line to cross."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from bench.case import is_ours
from bench.chart_style import (
    INK,
    RULE,
    SLOWER,
    colour_of,
    new_figure,
    plain_logarithmic,
    save,
    where_and_when,
)
from bench.tables import NOISE


def peers(rows: list[dict[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["contenders"])
    return [name for name in found if not is_ours(name)]


def draw(
    rows: list[dict[str, Any]], peer: str, title: str, report: dict[str, Any], folder: Path
) -> Path:
    """Grouped by case, a bar for each instruction set; what the peer does faster is hatched."""
    rows = [row for row in rows if peer in row["contenders"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    figure, axes = new_figure(
        9, 1.3 + 0.18 * len(cases) * max(1.4, len(isas)),
        f"{title}; {where_and_when(report)}",
    )  # fmt: skip
    thick = 0.8 / len(isas)
    values = []
    for row in rows:
        value = row["contenders"][peer]["speedup_of_ours"]
        values.append(value)
        y = cases.index(row["case"]) + thick * (isas.index(row["isa"]) - (len(isas) - 1) / 2)
        slower = value < NOISE
        axes.barh(
            y, value - 1, thick, left=1, color=colour_of(row["isa"]), edgecolor="white",
            hatch="////" if slower else None,
        )  # fmt: skip
        axes.annotate(
            f"{value:.2f}×", (value, y), xytext=(-3 if slower else 3, 0),
            textcoords="offset points", ha="right" if slower else "left", va="center",
            fontsize=7, color=SLOWER if slower else INK, fontweight="bold" if slower else None,
        )  # fmt: skip
    axes.axvline(1, color=INK, lw=1)
    plain_logarithmic(axes, axes.xaxis, "×")
    axes.set_xlim(min(0.9, *values) / 1.5, max(1.1, *values) * 1.4)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.set_xlabel("times faster, median over rounds (hatched: slower)", color=INK, fontsize=9)
    axes.legend(
        handles=[Patch(color=colour_of(isa), label=isa) for isa in isas], frameon=False,
        fontsize=8, loc="lower right",
    )  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
    return save(figure, folder / f"speedup_{name}.png")
