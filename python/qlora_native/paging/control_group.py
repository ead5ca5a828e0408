"""What its control groups leave a process of memory: Linux's cgroups, versions 1 and 2.

Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of the kernel. Where they are
mounted is asked of the system: version 1 has a mount for the controller "memory", some systems
have both versions, and in a container the group of the process may be the root of the mount.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Allowance:
    """Bytes of one group."""

    available: int  # not in use, or in use for files' pages, which the system can drop
    total: int


@dataclass(frozen=True)
class _Files:
    """How one version names things."""

    limits: tuple[str, ...]  # the smallest counts
    used: str
    droppable: tuple[str, ...]  # in memory.stat; memory that tmpfs has is not of it


_VERSION = {
    1: _Files(
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
    2: _Files(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
}


def memory_allowances(process: Path) -> list[Allowance]:
    """Of each group with a limit that the process, such as /proc/self, is in; none elsewhere."""
    found = []
    for version, folder in _folders(process):
        files = _VERSION[version]
        limits = [_number(folder / name) for name in files.limits]
        limit = min((n for n in limits if n is not None), default=None)
        if limit is not None:
            used = (_number(folder / files.used) or 0) - _droppable(folder, files.droppable)
            found.append(Allowance(max(0, limit - max(0, used)), limit))
    return found


def _folders(process: Path) -> Iterator[tuple[int, Path]]:
    """The process's groups and those above them, each with its version."""
    group_of: dict[int, str] = {}
    for line in _lines(process / "cgroup"):  # number:controllers:path
        number, controllers, path = line.split(":", 2)
        if number == "0":
            group_of[2] = path
        elif "memory" in controllers.split(","):
            group_of[1] = path
    for line in _lines(process / "mountinfo"):  # man 5 proc
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version not in group_of or (version == 1 and "memory" not in options.split(",")):
            continue
        root, mount = map(_unescaped, before.split(" ")[3:5])
        group = Path(group_of[version])
        # One that is not below the root of the mount is not to be seen: all that is, counts.
        inside = group.relative_to(root) if group.is_relative_to(root) else Path()
        own = Path(mount) if ".." in inside.parts else Path(mount, inside)
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield version, folder


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    """None where there is none ("max"), or no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _droppable(folder: Path, names: tuple[str, ...]) -> int:
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    return sum(int(counts.get(name, 0)) for name in names)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
