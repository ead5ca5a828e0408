"""Plants a fault in a CUDA kernel or a pager, runs it on the emulator, looks for what catches it.

pytest -s -q -k 'fault and caught' tests/python prints each with what caught it.
QLORA_TEST_FAULTS=some plants every sixth, for a run that is short of time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from emulated_build import EMULATION, KERNELS, compile_object, emulator_objects, link, run


@dataclass(frozen=True)
class Mutant:
    """One change to a file of cuda/, the units to compile again, and how it must show."""

    name: str
    file: str
    old: str
    new: str
    units: tuple[str, ...]
    caught_by: str  # the start of the fault, or "digest": other results


def mutant(name: str, file: str, old: str, new: str, units: str, caught_by: str) -> Mutant:
    return Mutant(name, f"kernels/{file}.cuh", old, new, tuple(units.split()), caught_by)


def each(mutants: Sequence[Mutant]) -> pytest.MarkDecorator:
    """Runs a test once for each, as its argument `mutant`."""
    chosen = mutants[::6] if os.environ.get("QLORA_TEST_FAULTS") == "some" else mutants
    return pytest.mark.parametrize("mutant", chosen, ids=lambda m: m.name)


@dataclass(frozen=True)
class Build:
    objects: dict[str, Path]
    digest: str


def build(folder: Path, runner: str, *units: str) -> Build:
    """The units so named, as they are (none: all launchers), and a program that prints digests."""
    objects = {path.stem: path for path in emulator_objects(folder)}
    objects["run"] = compile_object(EMULATION / runner, folder / "run.o")
    for pattern in units or ("launch/*",):
        for unit in sorted(KERNELS.glob(f"{pattern}.cu")):
            objects[unit.stem] = compile_object(unit, folder / f"{unit.stem}.o")
    digests = run(link([*objects.values()], folder / "run")).split()
    assert len(digests) == 3 and len(set(digests)) == 1, "three orders of threads give one result"
    return Build(objects, digests[0])


def assert_caught(mutant: Mutant, unchanged: Build, folder: Path) -> None:
    kernels = folder / "cuda"
    shutil.copytree(KERNELS, kernels)
    text = (kernels / mutant.file).read_text()
    assert mutant.old in text, f"{mutant.file} has changed: plant this fault anew"
    (kernels / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    changed = [
        compile_object(next(kernels.rglob(f"{unit}.cu")), folder / f"{unit}.o", kernels)
        for unit in mutant.units
    ]
    rest = [path for name, path in unchanged.objects.items() if name not in mutant.units]
    # The changed ones first: of a function that several units have, the linker takes the first.
    program = link([*changed, *rest], folder / "run")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    if mutant.caught_by == "digest":
        assert result.returncode == 0 and unchanged.digest not in result.stdout
        caught = "other results"
    else:
        assert result.returncode == 1, "ran through"
        caught = result.stdout.splitlines()[-1]
        assert caught.startswith(mutant.caught_by), caught
    print(f"\n{mutant.file}: {mutant.name}\n    caught by: {caught}")
