"""The report as it is kept, benchmarks.json: one machine, and sections made one by one.

- machine: what all figures depend on; a section that another machine made is not kept.
- limits: the best that was ever measured on it.
- sections: by title "made" (when, at which commit, under which load, how long it took), the
  section's Markdown and its data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.section import Section

Record = dict[str, Any]


def load(path: Path, machine: dict[str, Any]) -> Record:
    """What is in the file, if this machine made it with these versions; else an empty record."""
    empty: Record = {"machine": machine, "limits": None, "sections": {}}
    if not path.exists():
        return empty
    found: Record = json.loads(path.read_text())
    if found["machine"] == machine:
        return found
    before, now = found["machine"], machine
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    told = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in changed)
    print(f"{path}: its sections are dropped, the machine changed: {told}", file=sys.stderr)
    return empty


def put(record: Record, section: Section, made: dict[str, Any], order: list[str]) -> None:
    """Replace a section; they stay in the order of these titles."""
    sections = record["sections"]
    sections[section.title] = {"made": made, "markdown": section.markdown, "data": section.data}
    record["sections"] = {title: sections[title] for title in order if title in sections}


def save(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def data(record: Record, title: str, default: Any = None) -> Any:
    """A section's data, or `default` where it was not made."""
    section = record["sections"].get(title)
    return default if section is None else section["data"]


def days(record: Record) -> str:
    """The days on which its sections were made."""
    dates = sorted({section["made"]["date"][:10] for section in record["sections"].values()})
    return " and ".join(dates)
