"""What a figure depends on besides the code: processor, versions, load."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import qlora_native
from bench.peers import versions


def _first(path: str, key: str, default: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return default


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def _commit() -> str:
    """The commit, and -dirty where more has changed than what a report writes."""
    try:
        changed = _git("status", "--porcelain", "-uno", "--", ".", ":!docs", ":!README.md")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load() -> list[float]:
    """Processes that wanted to run, over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def huge_pages() -> str:
    """The kernel's setting, and torch's: both are the same for all contenders."""
    try:
        kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        setting = kernel.partition("[")[2].partition("]")[0]
    except OSError:
        setting = "unknown"
    return f"{setting} (THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')})"


def moment() -> dict[str, Any]:
    """When, and with which code."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def describe() -> dict[str, Any]:
    """What stays the same while sections of one report are made."""
    return {
        "processor": _first("/proc/cpuinfo", "model name", platform.processor()),
        "family_model": "/".join(
            _first("/proc/cpuinfo", key, "?") for key in ("cpu family", "model")
        ),
        "cores": os.cpu_count(),
        "memory": _first("/proc/meminfo", "MemTotal", "unknown"),
        "isas": qlora_native.available_isas(),
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qlora_native": qlora_native.__version__,
        **versions(),
    }
