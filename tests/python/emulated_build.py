"""Compiles the emulator, and the CUDA kernels for it, outside of the package's build."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
KERNELS = ROOT / "cuda"
EMULATOR = [
    "machine.cpp",
    "fibre.cpp",
    "allocations.cpp",
    "copies.cpp",
    "counters.cpp",
    "global_memory.cpp",
    "mbarriers.cpp",
    "products.cpp",
    "readers.cpp",
    "runtime.cpp",
    "shadow.cpp",
    "streams.cpp",
    "warpgroups.cpp",
    "wgmma_operand.cpp",
    "fibre_x86_64.S",
]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas"]


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def includes(kernels: Path) -> list[str]:
    return [f"-I{ROOT / 'cpp' / 'include'}", f"-I{EMULATION}", f"-I{kernels}"]


def compile_object(source: Path, output: Path, kernels: Path = KERNELS, *flags: str) -> Path:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    run(compiler(), *language, *FLAGS, *flags, *includes(kernels), "-c", source, "-o", output)
    return output


def emulator_objects(folder: Path, *flags: str) -> list[Path]:
    return [
        compile_object(EMULATION / name, folder / f"{name}.o", KERNELS, *flags) for name in EMULATOR
    ]


def link(objects: list[Path], output: Path, *flags: str) -> Path:
    run(compiler(), *flags, *objects, "-o", output)
    return output
