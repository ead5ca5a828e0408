"""The compiler's word on the CUDA kernels: registers, no spills, no local memory.

Two architectures by default; QLORA_TEST_CUDA_ARCHITECTURES="75 80 86 89 90a 100a 120a" for all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "cuda" / "launch").glob("*.cu"))
ARCHITECTURES = os.environ.get("QLORA_TEST_CUDA_ARCHITECTURES", "80 90a").split()
# cmake/Cuda.cmake's.
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")

# 65,536 registers of a multiprocessor, shared by the threads that tile.cuh wants resident.
# linear_few_rows: its launch bounds hold it to 128 up to 16 columns (two blocks of 256 threads);
# with more columns one block is resident.
MOST_REGISTERS = {
    "adamw_kernel": 64,
    "adamw_8bit_kernel": 64,
    "mean_kernel": 64,
    "linear_few_rows_kernel": 255,
    "linear_fma_kernel": 128,  # two blocks of 256 threads
    "lora_product_kernel": 255,  # 256 threads: lora_product.cuh says why they are enough
}
HOST_ONLY = {"backend", "linear_4bit", "linear_paths", "qlora_linear"}
MOST_REGISTERS_OF_TILES = 40


@dataclass(frozen=True)
class Resources:
    kernel: str
    registers: int
    stack: int
    spilled: int


def kernel_of(mangled: str) -> str:
    """A mangled name is made of parts, each after its length."""
    parts = [mangled[m.end() : m.end() + int(m[0])] for m in re.finditer(r"\d+", mangled)]
    return next(part for part in parts if part.endswith("_kernel"))


def resources(unit: Path, architecture: str, folder: Path) -> list[Resources]:
    command = [
        "nvcc", *FLAGS, f"-I{ROOT / 'cpp' / 'include'}", f"-I{ROOT / 'cuda'}",
        f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", str(unit),
        "-o", str(folder / f"{unit.stem}.cubin"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = []
    for name, stack, stores, loads, registers in re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers",
        result.stderr,
    ):
        spilled = int(stores) + int(loads)
        found.append(Resources(kernel_of(name), int(registers), int(stack), spilled))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_no_kernel_spills_or_uses_local_memory(
    unit: Path, architecture: str, tmp_path: Path
) -> None:
    kernels = resources(unit, architecture, tmp_path)
    assert kernels or unit.stem in HOST_ONLY, "ptxas reported no kernel"
    for kernel in kernels:
        most = MOST_REGISTERS.get(kernel.kernel, MOST_REGISTERS_OF_TILES)
        if architecture == "75":  # holds 1024 threads at most: all of them, at 64 registers
            most = max(most, 64)
        assert kernel.spilled == 0 and kernel.stack == 0, kernel
        assert kernel.registers <= most, kernel
