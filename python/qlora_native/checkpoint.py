"""Checkpoints: everything that a run needs to go on to the bit, never half written.

    checkpoints/step-000100/
        adapter_config.json, adapter_model.safetensors   the adapter, as PEFT reads it
        training_state.pt    step, trained parameters, optimizer, random state, settings, data hash
        manifest.json        size and SHA-256 of the files above; written last

A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed. A
kill at any moment leaves the earlier ones as they were. When one is read, its manifest is checked,
and one that fails (a bad disk, a bad copy) is passed over for the next older one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_native import files

_STATE = "training_state.pt"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; the message says what is unharmed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    state: dict[str, Any]
    passed_over: tuple[str, ...]  # newer ones that are corrupt: "step-000200: why"


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; the newest `keep` are kept."""

    folder: Path
    keep: int

    def paths(self) -> list[Path]:
        """Oldest first, whole or not."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step)

    def latest(self) -> Path | None:
        return next(iter(self.paths()[::-1]), None)

    def write(
        self, step: int, state: dict[str, Any], save_adapter: Callable[[Path], object] | None = None
    ) -> Path:
        """Writes the checkpoint of `step`, then removes all but the newest `keep`.

        Raises:
            CheckpointError: the disk is full, the folder cannot be written, …; earlier checkpoints
                are unharmed.
        """
        path = self.folder / f"step-{step:06d}"

        def fill(folder: Path) -> None:
            if save_adapter is not None:
                save_adapter(folder)
            with (folder / _STATE).open("wb") as file:
                torch.save(state, file)
            manifest = {file.name: _describe(file) for file in sorted(folder.iterdir())}
            (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))

        earlier = self.latest()
        try:
            files.write_folder(path, fill)
        except Exception as error:  # safetensors and torch wrap the system's errors in their own
            unharmed = f"{earlier} is unharmed" if earlier else "there is no earlier one"
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {error}; "
                f"{unharmed}. Free space on the disk, then go on with --resume"
            ) from error
        for old in self.paths()[: -self.keep]:
            if old != path:
                files.discard(old)
        return path

    def read_latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if none was ever written.

        Raises:
            CheckpointError: there are checkpoints, and every one is corrupt.
        """
        passed_over: list[str] = []
        for path in reversed(self.paths()):
            reason = find_fault(path)
            if reason is None:
                state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
                return Checkpoint(path, state, tuple(passed_over))
            passed_over.append(f"{path.name}: {reason}")
        if passed_over:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is corrupt ({'; '.join(passed_over)}); start "
                "anew without --resume"
            )
        return None


def find_fault(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    if _STATE not in expected:
        return f"{_MANIFEST} does not list {_STATE}"
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if _describe(file)["sha256"] != digest:
            return f"{name} does not have the checksum that was written"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
