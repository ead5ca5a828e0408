"""The report's charts, from its JSON alone.

python -m bench.charts                                   # docs/benchmarks.json -> docs/images
python -m bench.charts --json FILE --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import chart_roofline, chart_speedups

ROOT = Path(__file__).parent.parent


def draw(report: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Writes a PNG for the roofline and one for each section's peers; returns them by title."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = {title: _timed(kept["data"]) for title, kept in report["sections"].items()}
    rows = [row for timed in sections.values() for row in timed]
    images: dict[str, Path] = {}
    if any(row["flops"] for row in rows):
        images["Roofline"] = chart_roofline.draw(rows, report, folder)
    for section, timed in sections.items():
        for peer in chart_speedups.peers(timed):
            title = f"{section}: over {peer}"
            images[title] = chart_speedups.draw(timed, peer, title, report, folder)
    return images


def _timed(data: Any) -> list[dict[str, Any]]:
    """A section's rows, where the harness timed it."""
    return [row for row in data if "contenders" in row] if isinstance(data, list) else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "benchmarks.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    for path in draw(json.loads(args.json.read_text()), args.out).values():
        print(path)


if __name__ == "__main__":
    main()
