"""Where each tensor's state lies in a paged buffer, and in which chunks a step goes through it.

    small tensors   | a: exp_avg | a: exp_avg_sq | b: exp_avg | b: exp_avg_sq | … one range a chunk
    a large one     | exp_avg: chunk 0 | chunk 1 | … | exp_avg_sq: chunk 0 | chunk 1 | …

Each key of a tensor's state is contiguous, so that it is an ordinary tensor outside of the step. A
chunk holds as many whole tensors as fit, or a piece of one that is larger: the same values of each
of its keys, a multiple of 256 of them, so that no block of 8-bit state is cut in two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

CHUNK_BYTES = 16 << 20  # bench/bench_paged.py

_ALIGNMENT = 256  # paging.h
_PAGE = 4096
_HUGE_PAGE = 2 << 20
# Values in a piece are a multiple of one of these: huge pages of 8-bit codes or of fp32 moments,
# pages of 8-bit scales, or what aligns these.
_GRANULES = (_HUGE_PAGE, _HUGE_PAGE // 4, _PAGE // 4 * 256, _ALIGNMENT // 4 * 256)

Layout = Mapping[str, tuple[Sequence[int], torch.dtype]]


@dataclass(frozen=True)
class Plane:
    """One key of a tensor's state in the buffer."""

    begin: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: int  # of the parameter to an element: 256 for the scales of 8-bit state

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Its elements for the parameter's values [begin, end)."""
        return begin // self.values, -(-end // self.values)


@dataclass(frozen=True)
class Piece:
    """The values [begin, end) of a tensor; `whole` where these are all."""

    tensor: int
    begin: int
    end: int
    whole: bool


@dataclass(frozen=True)
class Chunk:
    """What is brought, stepped and let go at once; ranges are (begin, bytes) in the buffer."""

    pieces: tuple[Piece, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(n for _, n in self.ranges)


@dataclass(frozen=True)
class Plan:
    bytes: int
    planes: tuple[dict[str, Plane], ...]  # of each tensor
    chunks: tuple[Chunk, ...]


def make_plan(layouts: Sequence[Layout], sizes: Sequence[int], chunk_bytes: int) -> Plan:
    """Lays out state of tensors with these numbers of values, none of them 0."""
    planes: list[dict[str, Plane]] = []
    chunks: list[Chunk] = []
    gathered: list[Piece] = []  # whole tensors, of a chunk that begins at `start`
    start = end = 0
    # Chunks share no page.
    page = _HUGE_PAGE if chunk_bytes >= 4 * _HUGE_PAGE else _PAGE

    def close() -> None:
        nonlocal start, end
        if gathered:
            chunks.append(Chunk(tuple(gathered), ((start, end - start),)))
            gathered.clear()
        start = end = _up(end, page)

    for i, (layout, size) in enumerate(zip(layouts, sizes, strict=True)):
        total = sum(_up(_bytes(*entry), _ALIGNMENT) for entry in layout.values())
        is_large = total > chunk_bytes
        if is_large or end - start + total > chunk_bytes:
            close()
        placed = {}
        for key, (shape, dtype) in layout.items():
            n = math.prod(shape)
            placed[key] = Plane(end, tuple(shape), dtype, 1 if n == size else 256)
            end = _up(end + placed[key].bytes, page if is_large else _ALIGNMENT)
        planes.append(placed)
        if is_large:
            chunks += _cut(i, placed, size, chunk_bytes)
            start = end
        else:
            gathered.append(Piece(i, 0, size, whole=True))
    close()
    bytes_used = max(begin + n for chunk in chunks for begin, n in chunk.ranges)
    return Plan(bytes_used, tuple(planes), tuple(chunks))


def _cut(tensor: int, planes: Mapping[str, Plane], size: int, chunk_bytes: int) -> list[Chunk]:
    total = sum(plane.bytes for plane in planes.values())
    values = math.ceil(size / math.ceil(total / chunk_bytes))
    granule = next((g for g in _GRANULES if g <= values), _GRANULES[-1])
    values = _up(values, granule)
    chunks = []
    for begin in range(0, size, values):
        end = min(begin + values, size)
        ranges = []
        for plane in planes.values():
            first, last = plane.span(begin, end)
            width = plane.dtype.itemsize
            ranges.append((plane.begin + first * width, (last - first) * width))
        piece = Piece(tensor, begin, end, whole=values >= size)
        chunks.append(Chunk((piece,), tuple(ranges)))
    return chunks


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
