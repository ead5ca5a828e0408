"""What a run leaves for reading: metrics.jsonl, run.json, and a plot of the loss."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_native import files

_PACKAGES = ("qlora_native", "torch", "transformers", "tokenizers", "peft", "numpy", "safetensors")


@dataclass
class MetricsLog:
    """metrics.jsonl: one object a line, each with its "step"; flushed line by line.

    Opened for a run that goes on at `start`, it drops the lines of later steps, which will be
    computed again.
    """

    path: Path
    start: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> MetricsLog:
        if self.start > 0 and self.path.exists():
            self.records = [r for r in read_metrics(self.path) if r["step"] <= self.start]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        files.write_file(self.path, lines)
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object") from None
    return records


def describe_environment() -> dict[str, Any]:
    """Versions and the machine: what someone needs to repeat a run."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "build": _build_info(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def write_run(path: Path, content: dict[str, Any]) -> None:
    files.write_file(path, json.dumps(content, indent=2, default=str) + "\n")


def peak_rss() -> int:
    """Most bytes of memory this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """Bytes of memory this process holds now; the peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_rss()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _build_info() -> Any:
    import qlora_native

    build_info = getattr(qlora_native, "build_info", None)
    return build_info() if build_info is not None else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
