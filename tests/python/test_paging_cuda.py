"""The pagers of a GPU on the emulated runtime: their own tests, equal bits, planted faults.

Steps of optimizers with paged state are run by a program (run_paging.cpp), under schedules in which
copies are done as early as they may, as late, and at random times.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from emulated_build import EMULATION, compile_object, link, run
from planted_faults import Build, Mutant, assert_caught, build, each

pytest.importorskip("qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON")

RACE = "race between streams"
BITS = "other bits"


def planted(name: str, file: str, old: str, new: str, caught_by: str) -> Mutant:
    return Mutant(name, f"paging/{file}.cu", old, new, (file,), caught_by)


BUFFER = "device_buffer"
MUTANTS = [
    planted("no wait for what arrives", BUFFER, "if (range.arrived != nullptr) {", "if (false) {",
            RACE),
    planted("no event for what arrives", BUFFER,
            "if (status.ok()) status = mark(incoming, &range.arrived);", "", RACE),
    planted("the event before the copy", BUFFER,
            "if (status.ok()) status = carrier_->to_device(begin, bytes, range.address, incoming);"
            "\n  if (status.ok()) status = mark(incoming, &range.arrived);",
            "if (status.ok()) status = mark(incoming, &range.arrived);\n"
            "  if (status.ok()) status = carrier_->to_device(begin, bytes, range.address, "
            "incoming);", RACE),
    planted("the place still in use", BUFFER,
            "if (status.ok()) status = wait(incoming, mark);", "", RACE),
    planted("brought before it has left", BUFFER,
            "status = wait(incoming, departure.left);", "status = {};", RACE),
    planted("sent while in use", BUFFER, "{range.arrived, range.used, behind}) {",
            "{range.arrived, behind}) {", RACE),
    planted("no event for the use", BUFFER,
            "if (const Status status = mark(stream, &range.used); !status.ok()) return status;",
            "", RACE),
    planted("a place free before its copy", BUFFER,
            "carrier_->give(range.address, range.bytes, {left});",
            "carrier_->give(range.address, range.bytes, {});", RACE),
    planted("the host does not wait", BUFFER, "{streams_->incoming, streams_->outgoing}",
            "{streams_->incoming}", RACE),
    planted("a change that is forgotten", BUFFER, "range.modified |= modified;", "", BITS),
    planted("a place too short", "staged", "window_.take(aligned(bytes), after)",
            "window_.take(aligned(bytes / 2), after)", RACE),
    planted("a neighbour's page taken away", "managed", "(begin + kPage - 1) / kPage * kPage",
            "begin / kPage * kPage", RACE),
    planted("no prefetch", "managed", "return prefetch_to_device(address, bytes, device_, stream);",
            "return {};", "page fault"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("paging"), "run_paging.cpp", "paging/*", "launch/step")


def test_paged_steps_give_the_plain_steps_bits(unchanged: Build) -> None:
    """AdamW with 32-bit and 8-bit state, Lion: plain, by either pager; the program compares."""
    assert len(unchanged.digest) == 16


def test_what_they_refuse_and_count_and_free(unchanged: Build, tmp_path: Path) -> None:
    test = compile_object(EMULATION / "test_paging.cpp", tmp_path / "test_paging.o")
    rest = [path for name, path in unchanged.objects.items() if name != "run"]
    assert run(link([test, *rest], tmp_path / "test_paging")) == "0 failures\n"


@pytest.mark.slow
@each(MUTANTS)
def test_a_planted_fault_is_caught(mutant: Mutant, unchanged: Build, tmp_path: Path) -> None:
    assert_caught(mutant, unchanged, tmp_path)
