"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed.

And the directory of those that can be made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

CACHE_VARIABLE = "QLORA_NATIVE_CACHE"


def default_cache_dir() -> Path:
    """$QLORA_NATIVE_CACHE, else qlora_native in the XDG cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_native"


def write_file(path: Path, content: bytes | str) -> None:
    """Replaces `path` by `content`; after a crash it holds the old bytes or the new ones."""
    beside = path.with_name(f".{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets `fill` write into a new folder beside `path`, then puts it in the place of `path`.

    If `fill` raises, what it wrote is removed and an earlier `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    remove(beside)
    try:
        beside.mkdir()
        fill(beside)
        for file in sorted(beside.rglob("*")):
            sync_file(file) if file.is_file() else sync_folder(file)
        sync_folder(beside)
        discard(path)
        os.rename(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(path.parent)


def discard(path: Path) -> None:
    """Removes a folder so that a crash leaves all of it or nothing under its name."""
    if path.exists():
        away = path.with_name(f".{path.name}.removed")
        remove(away)
        os.rename(path, away)
        remove(away)


def remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
