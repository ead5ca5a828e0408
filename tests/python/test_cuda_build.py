"""The compiler's word on the CUDA kernels: registers, no spills, no local memory, instructions.

Two architectures by default; QLORA_TEST_CUDA_ARCHITECTURES="75 80 86 89 90a 100a 120a" for all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
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
    "step_kernel": 64,
    "step_8bit_kernel": 64,
    "mean_kernel": 64,
    "linear_few_rows_kernel": 255,
    "linear_fma_kernel": 128,  # two blocks of 256 threads
    "linear_wgmma_kernel": 168,  # 384 threads, before these share them out anew
    "linear_tiles_kernel": 255,  # of 256 rows; bounds hold the others to 128: two blocks of 256
    "lora_product_kernel": 255,  # 256 threads: lora_product.cuh says why they are enough
    "lora_tensor_kernel": 255,  # bounds hold it to three blocks of 128 up to 16 columns, else two
}
HOST_ONLY = {"backend", "linear_4bit", "linear_measured", "linear_paths", "qlora_linear"}
MOST_REGISTERS_OF_TILES = 40

# What a kernel's head comment says it is made of, as machine instructions, from sm_80 on: products
# on the tensor cores, copies to shared memory that do not pass through registers, and matrices from
# there.
INSTRUCTIONS = {
    "linear_few_rows_kernel": ("HMMA", "LDGSTS"),
    "linear_tiles_kernel": ("HMMA", "LDGSTS", "LDSM"),
    "lora_tensor_kernel": ("HMMA", "LDGSTS", "LDSM"),
}
# And on sm_90a alone: products of warpgroups, bulk copies, registers that change hands.
INSTRUCTIONS_OF_HOPPER = {
    "linear_wgmma_kernel": ("HGMMA", "LDGSTS", "UBLKCP", "USETMAXREG"),
}
OF_LOCAL_MEMORY = {"LDL", "STL"}
# A line of nvdisasm: /*0040*/  @!P0 LDG.E R2, …
_OPERATION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", re.MULTILINE)


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
    # Where ptxas cannot keep wgmma's sums untouched it makes each product wait, and says so.
    assert "serialized" not in result.stderr, result.stderr[-4000:]
    found = []
    for name, stack, stores, loads, registers in re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers",
        result.stderr,
    ):
        spilled = int(stores) + int(loads)
        found.append(Resources(kernel_of(name), int(registers), int(stack), spilled))
    return found


def disassembler() -> str | None:
    """nvdisasm, of the toolkit or of its package (nvidia-cuda-nvdisasm)."""
    of_package = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(of_package) if of_package.exists() else None)


def instructions(cubin: Path, program: str) -> list[tuple[str, set[str]]]:
    """Each kernel of a cubin, and the names of its machine instructions without their suffixes."""
    command = [program, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\t\.section\t\.text\.(\w+).*$", text, flags=re.MULTILINE)[1:]
    return [
        (kernel_of(name), set(_OPERATION.findall(code)))
        for name, code in zip(sections[::2], sections[1::2], strict=True)
    ]


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
    program = disassembler()
    if program is None or not kernels:
        return
    found = instructions(tmp_path / f"{unit.stem}.cubin", program)
    assert sorted(name for name, _ in found) == sorted(kernel.kernel for kernel in kernels)
    for name, used in found:
        assert "EXIT" in used and not used & OF_LOCAL_MEMORY, (name, used)
        if architecture != "75":
            listed = INSTRUCTIONS | (INSTRUCTIONS_OF_HOPPER if architecture == "90a" else {})
            missing = set(listed.get(name, ())) - used
            assert not missing, f"{name} has no {missing}"
