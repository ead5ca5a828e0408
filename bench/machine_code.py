"""What the CUDA compiler made of the kernels, read from its report and from the machine code.

No spills, no local memory, registers within what the occupancy needs, and the instructions that a
kernel's head comment names. tests/python/test_cuda_build.py asks it of every unit as it compiles
it, bench.gpu_acceptance's stage `sass` of the library that was built for the card that is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
_OF_PTXAS = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers"
)
_OF_CUOBJDUMP = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Resources:
    """Of one kernel for one architecture; stack and spilled in bytes a thread."""

    kernel: str
    registers: int
    stack: int
    spilled: int  # ptxas: stores and loads; cuobjdump: local memory, which is where they go


@dataclass(frozen=True)
class Code:
    """The names of one kernel's machine instructions, without their suffixes."""

    kernel: str
    instructions: frozenset[str]


def kernel_of(mangled: str) -> str:
    """A mangled name is made of parts, each after its length. All of it for what is no kernel."""
    parts = [mangled[m.end() : m.end() + int(m[0])] for m in re.finditer(r"\d+", mangled)]
    return next((part for part in parts if part.endswith("_kernel")), mangled)


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of the toolkit, of its package from PyPI, or of triton's."""
    nvcc = shutil.which("nvcc")
    packages = Path(sysconfig.get_path("purelib"))
    folders = [
        *([Path(nvcc).resolve().parent] if nvcc else []),
        Path("/usr/local/cuda/bin"),
        packages / "nvidia" / "cu13" / "bin",
        packages / "triton" / "backends" / "nvidia" / "bin",
    ]
    beside = (folder / name for folder in folders)
    return shutil.which(name) or next((str(path) for path in beside if path.exists()), None)


def of_ptxas(report: str) -> list[Resources]:
    """What nvcc wrote under -Xptxas -v."""
    return [
        Resources(kernel_of(name), int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in _OF_PTXAS.findall(report)
    ]


def of_cuobjdump(usage: str) -> list[Resources]:
    """What cuobjdump --dump-resource-usage wrote."""
    return [
        Resources(kernel_of(name), int(registers), int(stack), int(local))
        for name, registers, stack, local in _OF_CUOBJDUMP.findall(usage)
    ]


def of_nvdisasm(listing: str) -> list[Code]:
    """What nvdisasm -c wrote."""
    sections = re.split(r"^\t\.section\t\.text\.(\w+).*$", listing, flags=re.MULTILINE)[1:]
    return [
        Code(kernel_of(name), frozenset(_OPERATION.findall(text)))
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    ]


def disassembled(cubin: Path, nvdisasm: str) -> list[Code]:
    command = [nvdisasm, "-c", str(cubin)]
    return of_nvdisasm(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def faults_of_report(report: str) -> list[str]:
    """Where ptxas cannot keep wgmma's sums untouched it makes each product wait, and says so."""
    return [line.strip() for line in report.splitlines() if "serialized" in line]


def faults_of_resources(kernels: Sequence[Resources], architecture: str) -> list[str]:
    """architecture: as in nvcc's -arch=sm_..., "90a"."""
    found = []
    for kernel in kernels:
        most = MOST_REGISTERS.get(kernel.kernel, MOST_REGISTERS_OF_TILES)
        if architecture == "75":  # holds 1024 threads at most: all of them, at 64 registers
            most = max(most, 64)
        if kernel.spilled or kernel.stack:
            found.append(f"spills or keeps a stack: {kernel}")
        if kernel.registers > most:
            found.append(f"more than {most} registers: {kernel}")
    return found


def instructions_of(architecture: str) -> dict[str, tuple[str, ...]]:
    """What each kernel that says so must be made of."""
    if architecture == "75":
        return {}
    return INSTRUCTIONS | (INSTRUCTIONS_OF_HOPPER if architecture == "90a" else {})


def faults_of_code(kernels: Sequence[Code], architecture: str) -> list[str]:
    listed = instructions_of(architecture)
    found = []
    for kernel in kernels:
        if "EXIT" not in kernel.instructions:
            found.append(f"{kernel.kernel} never ends: its code was not read right")
        if local := OF_LOCAL_MEMORY & kernel.instructions:
            found.append(f"{kernel.kernel} uses local memory: {', '.join(sorted(local))}")
        if missing := set(listed.get(kernel.kernel, ())) - kernel.instructions:
            found.append(f"{kernel.kernel} has no {', '.join(sorted(missing))}")
    return found
