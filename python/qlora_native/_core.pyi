"""What the native library tells and lends, without a tensor (cpp/python/module.cpp)."""

from typing import Any

def build_info() -> dict[str, Any]:
    """How this build was made and what it can use here."""

def num_threads() -> int:
    """Threads an op may use: torch.get_num_threads()."""

def cpu_isa() -> str:
    """The instruction set in use: "scalar", "avx2", "neon", … (cpp/cpu/isa.h has all)."""

def available_isas() -> list[str]:
    """Built and run by this processor, narrowest first."""

def force_isa(name: str | None) -> None:
    """Use this instruction set from now on, process-wide; None for the widest.

    Raises ValueError where this processor does not run it.
    """

def force_cuda_linear(forward: str | None, backward_input: str | None) -> None:
    """Multiply by 4-bit weights on a GPU in that way alone, process-wide; None: by the table.

    In builds with CUDA; build_info() lists the ways. Raises ValueError where it has no such way.
    """

def last_cuda_linear_way(direction: str) -> str | None:
    """The way that the latest call took, in builds with CUDA; None before the first."""

def set_cuda_linear_choices(
    device: int, rows: list[tuple[str, str, bool, int, int, int, int, str]]
) -> None:
    """What was measured on that device, in place of what was set for it before.

    A row is (direction, dtype, double_quant, n, k, blocksize, most_m, way). In builds with CUDA.
    Raises ValueError, and sets nothing, where a row names no direction, dtype or way.
    """

def codebook(format: str) -> list[float]:
    """The 16 values of "nf4" or "fp4", by code."""

def dynamic_map(signed: bool) -> list[float]:
    """The 256 values of the dynamic 8-bit map, by code."""

def pagers() -> list[str]:
    """The names of the pagers in this build: "file", and with CUDA "managed" and "staged"."""

def why_no_pager(name: str, device: int = 0) -> str | None:
    """What that pager lacks here to work for this device, or None. ValueError: no such pager."""

class PagedBytes:
    """Bytes of a PagedBuffer; torch.from_dlpack makes a uint8 tensor of them that keeps it."""

    @property
    def address(self) -> int: ...
    def part(self, begin: int, bytes: int) -> PagedBytes: ...
    def __dlpack__(self, stream: object = None, **kwargs: object) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class PagedBuffer:
    """Zeros that may be elsewhere; what each call does is told in qlora_native/paging.h.

    Args:
        pager: one of pagers().
        bytes: more than 0; all of it is reserved here.
        device: whose memory the state leaves ("managed", "staged").
        directory: on a disk ("file"); None: what TMPDIR names, or /var/tmp.
        window_bytes: device memory for what is present at once ("staged").
        oversubscribe: it may be more than the device has free now ("managed").

    Ranges begin at multiples of 256 bytes. `stream` is a cudaStream_t.

    Raises:
        OSError: the directory cannot be written, its disk is full, it maps no files.
        MemoryError: there is not enough memory for it.
        ValueError: an argument is out of its range.
        RuntimeError: the device or the disk failed.
    """

    def __init__(
        self,
        pager: str,
        bytes: int,
        *,
        device: int = 0,
        directory: str | None = None,
        window_bytes: int = 0,
        oversubscribe: bool = False,
    ) -> None: ...
    @property
    def pager(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    def host_view(self) -> PagedBytes: ...
    def prefetch(self, begin: int, bytes: int, stream: int = 0) -> None: ...
    def acquire(self, begin: int, bytes: int, stream: int = 0) -> PagedBytes: ...
    def release(self, begin: int, bytes: int, stream: int = 0, modified: bool = True) -> None: ...
    def evict(self, begin: int, bytes: int, stream: int = 0) -> None: ...
    def settle(self) -> None: ...
    def stats(self) -> dict[str, int]:
        """bytes, resident, moved_in, moved_out (bytes) and waited_ns."""
