"""Which file of a Hugging Face folder holds which tensor.

Either one `model.safetensors`, or shards named by `model.safetensors.index.json`
({"weight_map": {tensor name: file name}}). Both give the same thing: a map from name to open file.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch import Tensor

from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.safetensors_io import SafetensorsReader, TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
)


class CheckpointIndex:
    """All tensors of a folder by name, in the order in which they lie in their files.

    Opening checks every shard's header, so that a missing or truncated file is found before any
    work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files = ExitStack()
        try:
            weight_map = self._read_index()
            self._readers = {
                file_name: self._open_files.enter_context(self._open(file_name, weight_map))
                for file_name in dict.fromkeys(weight_map.values())
            }
            self._readers_by_name = self._match(weight_map)
        except BaseException:
            self._open_files.close()
            raise

    def __enter__(self) -> CheckpointIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open_files.close()

    def names(self) -> list[str]:
        return list(self._readers_by_name)

    def file_of(self, name: str) -> Path:
        return self._readers_by_name[name].path

    def entry(self, name: str) -> TensorEntry:
        return self._readers_by_name[name].entries[name]

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        return self._readers_by_name[name].read(name, buffer)

    def _read_index(self) -> dict[str, str]:
        """Tensor name to file name; {"": file} where a single file needs no index."""
        if not self.folder.is_dir():
            raise CheckpointError(f"no model folder at {self.folder}")
        if (self.folder / SINGLE_FILE).is_file():
            return {"": SINGLE_FILE}
        path = self.folder / INDEX_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{self.folder} holds no {SINGLE_FILE} and no {INDEX_FILE}{self._other_weights()}"
            )
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
                raise TypeError("weight_map must map tensor names to file names")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not an index of shards: {error}") from error
        return dict(weight_map)

    def _open(self, file_name: str, weight_map: dict[str, str]) -> SafetensorsReader:
        path = self.folder / file_name
        if Path(file_name).name != file_name:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} names a file outside its folder: {file_name!r}"
            )
        if not path.is_file():
            count = sum(1 for value in weight_map.values() if value == file_name)
            raise CheckpointError(
                f"{path} is missing; {INDEX_FILE} says that it holds {count} tensors"
            )
        return SafetensorsReader(path)

    def _match(self, weight_map: dict[str, str]) -> dict[str, SafetensorsReader]:
        found = {name: reader for reader in self._readers.values() for name in reader.entries}
        if "" in weight_map:
            return found
        for name, file_name in weight_map.items():
            if name not in self._readers[file_name].entries:
                raise CheckpointError(
                    f"{self.folder / file_name} holds no tensor {name!r}, though {INDEX_FILE} "
                    "says so"
                )
            found[name] = self._readers[file_name]
        return found

    def _other_weights(self) -> str:
        others = [name for name in _OTHER_WEIGHTS if (self.folder / name).exists()]
        others += [path.name for path in sorted(self.folder.glob("*.gguf"))]
        if not others:
            return ""
        if others[0].endswith(".gguf"):
            return f"; it does hold {others[0]}: give the path of that file"
        return (
            f"; it does hold {others[0]}: only safetensors are read (pickled weights can run "
            "code); convert it with transformers' save_pretrained"
        )
