"""The CPU paths of an ARM processor: cross-compiled, run in an emulator, held to the same tests."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from cpp_build import ROOT, build, run, run_tests

EMULATOR = "qemu-aarch64"
NM = "aarch64-linux-gnu-nm"


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("cmake", "aarch64-linux-gnu-g++", EMULATOR)
    folder = tmp_path_factory.mktemp("aarch64")
    build(folder, "--toolchain", f"{ROOT}/cmake/aarch64-linux-gnu.cmake")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "isas"),
    [
        ("max", ["scalar", "neon", "neonbf16"]),
        # Armv8.0: an instruction of a later one would end the program.
        ("cortex-a57", ["scalar", "neon"]),
    ],
)
def test_the_neon_paths_pass_the_cpp_tests(aarch64: Path, processor: str, isas: list[str]) -> None:
    for ran in run_tests(aarch64, EMULATOR, QEMU_CPU=processor):
        assert ran == isas


@pytest.mark.slow
def test_no_function_of_bf16_code_can_stand_in_for_another(aarch64: Path) -> None:
    # Of an inline function that two objects carry the linker keeps one: test_isa_leak.py tells why.
    objects = {path.name: path for path in aarch64.glob("CMakeFiles/**/*.o")}
    functions = {
        name: set(re.findall(r" [Ww] (\w+)$", run(NM, "--defined-only", path), re.MULTILINE))
        for name, path in objects.items()
    }
    bf16 = functions.pop("isa_neonbf16.cpp.o")
    assert len(bf16) > 100
    assert not {name: shared for name, those in functions.items() if (shared := bf16 & those)}


@pytest.mark.slow
def test_the_scalar_path_gives_the_same_bits(aarch64: Path, tmp_path: Path) -> None:
    needs("c++")
    build(tmp_path)
    digests = run(tmp_path / "tests/cpp/scalar_digest")
    assert len(digests.splitlines()) == 13
    assert run(EMULATOR, aarch64 / "tests/cpp/scalar_digest") == digests
