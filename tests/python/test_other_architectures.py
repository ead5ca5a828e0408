"""The scalar path on an ARM processor: cross-compiled, run in an emulator, and equal to the bit."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(p for p in sorted((ROOT / "cpp/cpu").glob("*.cpp")) if not p.name.startswith("isa_")),
    ROOT / "cpp/cpu/isa_scalar.cpp",
    ROOT / "tests/cpp/scalar_digest.cpp",
]
# As CMakeLists.txt and cmake/Isa.cmake give them.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Werror"]

CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def build(compiler: str, binary: Path, *extra: str) -> Path:
    subprocess.run(
        [compiler, *FLAGS, *extra, f"-I{ROOT / 'cpp/include'}", *SOURCES, "-o", binary],
        check=True,
        timeout=300,
    )
    return binary


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
def test_aarch64_gives_the_same_bits(tmp_path: Path) -> None:
    needs("c++", CROSS, EMULATOR)
    # Without QLORA_HAS_*: the scalar path alone, as on a processor that is no x86-64.
    with ThreadPoolExecutor() as pool:
        here = pool.submit(build, "c++", tmp_path / "here")
        there = pool.submit(build, CROSS, tmp_path / "there", "-static")
    digests = output(here.result())
    assert len(digests.splitlines()) == 13
    assert output(EMULATOR, there.result()) == digests
