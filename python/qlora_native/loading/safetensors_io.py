"""Safetensors files, read one tensor at a time into ordinary memory and written without a copy.

Layout: u64 little-endian n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}},
then the tensors' bytes; offsets count from the end of the JSON. The published readers map the file,
and a mapped page counts as resident until the kernel drops it; here `pread` fills a buffer that the
caller frees, so what a load needs is what it holds. Every number in the header is checked before it
is believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qlora_native.loading.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ALIGNMENT = 8  # the header is padded with spaces, so that the data starts aligned

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # absolute, in bytes
    nbytes: int


class SafetensorsReader:
    """One open file: `entries` is its table of contents, `read` fetches a tensor.

    Raises CheckpointError, which names the file, for anything that is not a complete safetensors
    file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """The tensor `name`, in memory of its own or in the first bytes of the uint8 `buffer`."""
        entry = self.entries[name]
        if buffer is None:
            buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        raw = buffer[: entry.nbytes]
        view = _memory(raw)
        done = 0
        while done < entry.nbytes:
            count = os.preadv(self._file.fileno(), [view[done:]], entry.begin + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} became shorter while it was read: tensor {name!r} wants bytes "
                    f"up to {entry.begin + entry.nbytes}, the file ends at {entry.begin + done}"
                )
            done += count
        return raw.view(entry.dtype).reshape(entry.shape)

    def _read_header(self) -> dict[str, TensorEntry]:
        prefix = os.pread(self._file.fileno(), 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self._size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path} is not a complete safetensors file: its header claims {length} "
                f"bytes, the file has {self._size}; download or copy it again"
            )
        try:
            header = json.loads(os.pread(self._file.fileno(), length, 8))
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} is not a safetensors file or is damaged: its header is no JSON "
                f"({error})"
            ) from error
        if not isinstance(header, dict):
            raise CheckpointError(
                f"{self.path}: the header must be a JSON object, got {header!r:.80}"
            )
        header.pop("__metadata__", None)
        return {name: self._entry(name, info, 8 + length) for name, info in header.items()}

    def _entry(self, name: str, info: Any, data_start: int) -> TensorEntry:
        try:
            dtype = _DTYPES[info["dtype"]]
            shape = tuple(int(size) for size in info["shape"])
            begin, end = (int(offset) for offset in info["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has a header entry that cannot be read: "
                f"{info!r:.120}"
            ) from error
        nbytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(shape)} and dtype {info['dtype']} "
                f"needs {nbytes} bytes, its header gives {end - begin}; the file is damaged"
            )
        if data_start + end > self._size:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {data_start + end}, "
                f"the file at {self._size}; download or copy it again"
            )
        return TensorEntry(dtype, shape, data_start + begin, nbytes)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to `path`, streaming each one's bytes, and flush them to the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())


def shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterable[dict[str, Tensor]]:
    """Split in order into parts of at most `max_bytes` (a larger tensor has its own)."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if part and size + nbytes > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += nbytes
    yield part


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return _memory(flat.view(torch.uint8))


def _memory(raw: Tensor) -> memoryview:
    array: Any = raw.numpy()  # numpy's annotations do not tell that an array is a buffer
    return memoryview(array)
