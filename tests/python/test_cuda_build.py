"""The compiler's word on the CUDA kernels: registers, no spills, no local memory, instructions.

Two architectures by default; QLORA_TEST_CUDA_ARCHITECTURES="75 80 86 89 90a 100a 120a" for all.
What is asked of a kernel is written in bench/machine_code.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bench import machine_code
from bench.machine_code import Code, Resources

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "cuda" / "launch").glob("*.cu"))
ARCHITECTURES = os.environ.get("QLORA_TEST_CUDA_ARCHITECTURES", "80 90a").split()
# cmake/Cuda.cmake's.
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false"]
HOST_ONLY = {"backend", "linear_4bit", "linear_measured", "linear_paths", "qlora_linear"}


def compile_unit(unit: Path, architecture: str, cubin: Path) -> str:
    """The compiler's report."""
    command = [
        "nvcc", *FLAGS, f"-I{ROOT / 'cpp' / 'include'}", f"-I{ROOT / 'cuda'}",
        f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", str(unit), "-o", str(cubin),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_no_kernel_spills_or_uses_local_memory(
    unit: Path, architecture: str, tmp_path: Path
) -> None:
    cubin = tmp_path / f"{unit.stem}.cubin"
    report = compile_unit(unit, architecture, cubin)
    assert not machine_code.faults_of_report(report)
    kernels = machine_code.of_ptxas(report)
    assert kernels or unit.stem in HOST_ONLY, "ptxas reported no kernel"
    assert not machine_code.faults_of_resources(kernels, architecture)
    nvdisasm = machine_code.tool("nvdisasm")
    if nvdisasm is None or not kernels:
        return
    code = machine_code.disassembled(cubin, nvdisasm)
    assert sorted(c.kernel for c in code) == sorted(kernel.kernel for kernel in kernels)
    assert not machine_code.faults_of_code(code, architecture)


TILES = "linear_tiles_kernel"
WHOLE = frozenset({"HMMA", "LDGSTS", "LDSM", "EXIT"})


@pytest.mark.parametrize(
    ("kernel", "architecture", "fault"),
    [
        (Resources(TILES, 255, 0, 0), "80", None),
        (Resources(TILES, 255, 0, 8), "80", "spills"),
        (Resources(TILES, 255, 16, 0), "80", "stack"),
        (Resources("step_kernel", 65, 0, 0), "80", "more than 64 registers"),
        (Resources("quantize_4bit_kernel", 41, 0, 0), "80", "more than 40 registers"),
        (Resources("quantize_4bit_kernel", 41, 0, 0), "75", None),
        (Code(TILES, WHOLE), "80", None),
        (Code(TILES, WHOLE | {"LDL"}), "80", "local memory: LDL"),
        (Code(TILES, WHOLE - {"HMMA", "LDSM"}), "80", "has no HMMA, LDSM"),
        (Code(TILES, WHOLE - {"HMMA", "LDSM"}), "75", None),
        (Code(TILES, WHOLE - {"EXIT"}), "80", "never ends"),
        (Code("linear_wgmma_kernel", WHOLE), "90a", "has no HGMMA, UBLKCP, USETMAXREG"),
    ],
)
def test_each_fault_is_found(
    kernel: Resources | Code, architecture: str, fault: str | None
) -> None:
    if isinstance(kernel, Resources):
        found = machine_code.faults_of_resources([kernel], architecture)
    else:
        found = machine_code.faults_of_code([kernel], architecture)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


# As ptxas 13.0, cuobjdump 13.0 and nvdisasm 13.0 write them.
NAME = "_ZN5qlora4cuda11mean_kernelEPKflPf"
PTXAS = f"""ptxas info    : Compiling entry function '{NAME}' for 'sm_90a'
ptxas info    : Function properties for {NAME}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""
CUOBJDUMP = f""" Function {NAME}:
  REG:40 STACK:8 SHARED:32 LOCAL:16 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
NVDISASM = f"""\t.section\t.text.{NAME},"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   EXIT ;
"""


def test_the_tools_words_are_read() -> None:
    expected = [Resources("mean_kernel", 40, 8, 16)]
    assert machine_code.of_ptxas(PTXAS) == machine_code.of_cuobjdump(CUOBJDUMP) == expected
    assert machine_code.of_nvdisasm(NVDISASM) == [
        Code("mean_kernel", frozenset({"LDC", "LDG", "EXIT"}))
    ]
    assert len(machine_code.faults_of_report(PTXAS)) == 1
