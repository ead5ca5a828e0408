"""Build information, instruction sets and codebooks of qlora_native (cpp/python/module.cpp)."""

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
