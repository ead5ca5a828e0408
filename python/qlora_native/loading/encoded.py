"""A checkpoint whose weights another method has encoded, read as the floats that they stand for.

An encoded weight is several tensors of the file: codes, scales, zero points. Here each is one float
tensor again, under the name that it would have in an un-quantized checkpoint, and is decoded when
it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_native.loading.checkpoint_index import CheckpointIndex
from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.safetensors_io import TensorEntry


@dataclass(frozen=True)
class EncodedTensor:
    """One float tensor: its shape, the names of its parts in the file, and how they make it."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Callable[[dict[str, Tensor]], Tensor]

    @property
    def first(self) -> str:
        """The part in whose place the float tensor stands."""
        return next(iter(self.parts.values()))


class DecodedIndex:
    """A CheckpointIndex with some tensors decoded, and others, of no use for weights, left out.

    Args:
        index: of the files.
        encoded: by the float tensor's name.
        ignored: names of tensors that are part of nothing here.
    """

    def __init__(
        self, index: CheckpointIndex, encoded: Mapping[str, EncodedTensor], ignored: set[str]
    ) -> None:
        self.index = index
        self.folder = index.folder
        self.encoded = encoded
        stands_at = {tensor.first: name for name, tensor in encoded.items()}
        parts = {part for tensor in encoded.values() for part in tensor.parts.values()}
        self._names = [
            stands_at.get(name, name)
            for name in index.names()
            if name in stands_at or not (name in parts or name in ignored)
        ]

    def names(self) -> list[str]:
        return self._names

    def file_of(self, name: str) -> Path:
        return self.index.file_of(self._stored(name))

    def entry(self, name: str) -> TensorEntry:
        entry = self.index.entry(self._stored(name))
        if name not in self.encoded:
            return entry
        return dataclasses.replace(entry, dtype=torch.float32, shape=self.encoded[name].shape)

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        if name not in self.encoded:
            return self.index.read(name, buffer)
        tensor = self.encoded[name]
        parts = {part: self.index.read(stored) for part, stored in tensor.parts.items()}
        try:
            return tensor.decode(parts)
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = {part: list(value.shape) for part, value in parts.items()}
            raise CheckpointError(
                f"{self.file_of(name)}: the parts of {name!r}, of shapes {shapes}, do not fit "
                f"together: {error}"
            ) from error

    def _stored(self, name: str) -> str:
        return self.encoded[name].first if name in self.encoded else name
