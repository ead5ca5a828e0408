"""The state of some tensors of one device in one paged buffer, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qlora_native._core import PagedBuffer, PagedBytes
from qlora_native.paging.plan import Chunk, Layout, Plane, make_plan

State = dict[str, Tensor]

# Chunks that are present besides those that stay: one is worked on, one comes, one leaves.
WORKING_CHUNKS = 3
# What the pager "file" lets be on its way to the disk besides (paging_file.cpp).
_FILE_LEAVING = 32 << 20


@dataclass(frozen=True)
class Place:
    """Where arenas are made."""

    pager: str
    device: torch.device  # of the parameters
    directory: str | None  # "file"
    chunk_bytes: int
    why: str  # that pager


class Arena:
    """Zeros for the state of tensors with `sizes` values each, in `layouts`.

    tensors: the state of each, shaped; on the host, and up to date after `sync`.
    chunks: what a step goes through, in the order of the buffer.

    Raises what PagedBuffer raises.
    """

    def __init__(
        self,
        place: Place,
        layouts: Sequence[Layout],
        sizes: Sequence[int],
        budget: int,
    ) -> None:
        self.plan = make_plan(layouts, sizes, place.chunk_bytes)
        self.chunks = self.plan.chunks
        self.device = place.device
        self.why = place.why
        # On a GPU chunks that stay cost nothing to have at once, and a launch for each would.
        self.at_once = place.pager != "file"
        largest = max(chunk.bytes for chunk in self.chunks)
        # Each range of a window is rounded up.
        slack = sum(256 * len(chunk.ranges) for chunk in self.chunks)
        self.working = WORKING_CHUNKS * largest
        self.window = min(self.plan.bytes, max(budget, self.working)) + slack
        if place.pager == "file":
            self.working += _FILE_LEAVING
        self.buffer = PagedBuffer(
            place.pager,
            self.plan.bytes,
            device=place.device.index or 0,
            directory=place.directory,
            window_bytes=self.window,
        )
        whole = self.buffer.host_view()
        self.tensors: list[State] = [
            {key: _tensor(whole, plane, plane.begin, None) for key, plane in planes.items()}
            for planes in self.plan.planes
        ]
        # For each chunk the addresses that its ranges had, and the tensors there.
        self._views: dict[int, tuple[list[int], list[State]]] = {}

    def prefetch(self, i: int) -> None:
        """Begin to bring chunk i."""
        stream = self._stream()
        for begin, n in self.chunks[i].ranges:
            self.buffer.prefetch(begin, n, stream)

    def acquire(self, i: int) -> list[State]:
        """The state of each piece of chunk i, for kernels that are launched until `release`.

        Of whole tensors in their shape, of other pieces flat. If it raises, nothing is acquired.
        """
        stream = self._stream()
        bytes_of: list[PagedBytes] = []
        try:
            for begin, n in self.chunks[i].ranges:
                bytes_of.append(self.buffer.acquire(begin, n, stream))
        except Exception:
            for begin, n in self.chunks[i].ranges[: len(bytes_of)]:
                self.buffer.release(begin, n, stream, modified=False)
            raise
        addresses = [each.address for each in bytes_of]
        known = self._views.get(i)
        if known is None or known[0] != addresses:
            known = self._views[i] = (addresses, self._states(self.chunks[i], bytes_of))
        return known[1]

    def release(self, i: int) -> None:
        """What works on it has been launched."""
        stream = self._stream()
        for begin, n in self.chunks[i].ranges:
            self.buffer.release(begin, n, stream)

    def evict(self, i: int) -> None:
        """Let it go, behind what has been launched."""
        stream = self._stream()
        for begin, n in self.chunks[i].ranges:
            self.buffer.evict(begin, n, stream)

    def evict_all(self) -> None:
        """Let everything go and wait until it has."""
        for i in range(len(self.chunks)):
            self.evict(i)
        self.buffer.settle()

    def sync(self) -> None:
        """Bring `tensors` up to date; what is written there counts from the next step on."""
        self.buffer.host_view()

    def _states(self, chunk: Chunk, bytes_of: Sequence[PagedBytes]) -> list[State]:
        states = []
        for piece in chunk.pieces:
            state = {}
            for i, (key, plane) in enumerate(self.plan.planes[piece.tensor].items()):
                # Whole tensors lie one after the other in one range, a large one's keys in a range
                # each.
                which = i if len(chunk.ranges) > 1 else 0
                first, last = plane.span(piece.begin, piece.end)
                offset = plane.begin + first * plane.dtype.itemsize - chunk.ranges[which][0]
                span = None if piece.whole else (last - first,)
                state[key] = _tensor(bytes_of[which], plane, offset, span)
            states.append(state)
        return states

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)


def _tensor(memory: PagedBytes, plane: Plane, offset: int, span: tuple[int] | None) -> Tensor:
    """The plane, or that many of its elements, `offset` bytes into the memory.

    Each has a storage of its own, so that what is saved or copied is no more than it.
    """
    shape = plane.shape if span is None else span
    n = plane.bytes if span is None else span[0] * plane.dtype.itemsize
    flat = from_dlpack(memory.part(offset, n))
    return flat.view(plane.dtype).view(shape)
