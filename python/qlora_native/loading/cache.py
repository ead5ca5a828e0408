"""Quantized models kept on the disk, so that the same source loads fast the second time.

An entry is a quantized folder plus `cache.json`: what it was made from, and each file's length and
CRC-32. Its name is a hash of the source (path, and size and modification time of its files), of the
settings and of the versions involved: whatever changes, another entry is meant. An entry that fails
its check is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
import zlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qlora_native.files import CACHE_VARIABLE
from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.quantized_folder import fill, settings_of
from qlora_native.loading.settings import QuantSettings
from qlora_native.loading.skeleton import Model

_LAYOUT = 1  # raise it when an older entry must not be read any more
_RECORD = "cache.json"
_CHUNK = 1 << 20


class QuantizedCache:
    """The entry of one source with one set of settings under `directory`."""

    def __init__(
        self, directory: Path, source: Path, dtype: torch.dtype | None, settings: QuantSettings
    ) -> None:
        self.source = source.resolve()
        self.made_from = {
            "source": str(self.source),
            "files": _fingerprint(self.source),
            "dtype": str(dtype),
            "settings": json.loads(json.dumps(asdict(settings))),
            "versions": {"layout": _LAYOUT, **_versions("qlora-native", "transformers", "gguf")},
        }
        digest = hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()
        self.directory = directory
        self.folder = directory / f"{self.source.stem}-{digest[:16]}"

    def is_good(self) -> bool:
        """Whether the entry is there, whole and undamaged; warns if it is there and is not."""
        if not self.folder.is_dir():
            return False
        try:
            record = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
            if record["made_from"] != self.made_from:
                raise ValueError("it was made from something else")
            for name, checksum in record["files"].items():
                if _checksum(self.folder / name) != checksum:
                    raise ValueError(f"{name} has changed since it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"the cached model {self.folder} is damaged ({error}) and is made anew",
                stacklevel=2,
            )
            return False
        return True

    def store(self, model: Model, tokenizer: Any) -> None:
        """Write the entry and drop outdated ones; warns if it cannot be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # A name of its own, as another process may be making the same entry.
            with tempfile.TemporaryDirectory(prefix=".making-", dir=self.directory) as making:
                entry = Path(making) / self.folder.name
                entry.mkdir()
                fill(entry, model, tokenizer, settings_of(model))
                checksums = {path.name: _checksum(path) for path in sorted(entry.iterdir())}
                record = {"made_from": self.made_from, "files": checksums}
                (entry / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
                shutil.rmtree(self.folder, ignore_errors=True)
                entry.rename(self.folder)
        except OSError as error:
            warnings.warn(
                f"the quantized model cannot be cached in {self.directory} ({error}), so that the "
                f"next load takes as long; name another folder by ${CACHE_VARIABLE}",
                stacklevel=2,
            )
            return
        self._drop_outdated()

    def _drop_outdated(self) -> None:
        """Remove entries of the same source and settings, of other files or versions."""
        for record_path in self.directory.glob(f"*/{_RECORD}"):
            if record_path.parent == self.folder:
                continue
            try:
                made_from = json.loads(record_path.read_text(encoding="utf-8"))["made_from"]
                same = all(
                    made_from[key] == self.made_from[key] for key in ("source", "dtype", "settings")
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if same:
                shutil.rmtree(record_path.parent, ignore_errors=True)


def _fingerprint(source: Path) -> list[list[Any]]:
    """Name, size and modification time of each file that the source consists of."""
    candidates = [source] if source.is_file() else sorted(source.iterdir())
    files = [path for path in candidates if path.is_file()]
    if not files:
        raise CheckpointError(f"{source} holds no file")
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _checksum(path: Path) -> list[int]:
    """[length, CRC-32]"""
    length = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            length += len(chunk)
    return [length, crc]
