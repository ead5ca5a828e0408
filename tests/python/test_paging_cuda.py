"""The pagers of a GPU on the emulated runtime: their own tests, equal bits, planted faults.

Steps of optimizers with paged state are run by a program (run_paging.cpp), under schedules in which
copies are done as early as they may, as late, and at random times.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from emulated_build import EMULATION, compile_object, link, run
from optimizers import assert_equal
from planted_faults import Build, Mutant, assert_caught, build, each
from qlora_native import optim
from qlora_native.optim.native import NativeOptimizer
from qlora_native.optim.paged_state import PagedState
from qlora_native.paging.pagers import choose_pager
from test_paged_optim import assert_same_state, groups, parameters, train
from test_paged_optim import each as each_optimizer

emulation = pytest.importorskip(
    "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
)

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


# ---- the optimizers ------------------------------------------------------------------------------

# State of some 30 kB each: the window holds three chunks of eight.
SIZES = [(1,), (3, 5), (4096,), (60, 67), (255,), (32, 127), (4095,), (3999,), (64, 64), (63, 65)]
SMALL = {"chunk_bytes": 1 << 13, "min_paged_size": 0}
pagers = pytest.mark.parametrize("pager", ["managed", "staged"])


@pytest.fixture
def on_emulator() -> Iterator[None]:
    """The ops, and a device whose memory is all free again when the test ends, with no fault."""
    emulation.use(True)
    emulation.take_faults()
    before = emulation.alive()
    yield
    emulation.use(False)
    emulation.fail("any", 0)
    emulation.set_schedule("early")
    emulation.set_device_bytes(1 << 30)
    emulation.set_concurrent_managed_access(True)
    gc.collect()
    assert emulation.take_faults() == []
    assert emulation.alive() == before


def make(
    pager: str, budget: int | str, paged: type[PagedState] = optim.PagedAdamW
) -> tuple[PagedState, list[nn.Parameter]]:
    params = parameters(SIZES)
    return paged(groups(params), lr=1e-2, pager=pager, device_budget=budget, **SMALL), params


@pagers
@each_optimizer
@pytest.mark.parametrize(
    ("schedule", "budget"), [("early", "auto"), ("late", 0), ("drawn", "100kB")]
)
def test_optimizers_give_the_bits_of_the_plain_ones(
    paged: type[PagedState],
    plain: type[NativeOptimizer],
    pager: str,
    schedule: str,
    budget: int | str,
    on_emulator: None,
) -> None:
    """And what they moved comes back into their state, and is moved again."""
    emulation.set_schedule(schedule, 5)
    optimizer, ours = make(pager, budget, paged)
    theirs = parameters(SIZES)
    other = plain(groups(theirs), lr=1e-2)
    for steps in (range(2), range(2, 4)):
        train(optimizer, ours, steps)
        train(other, theirs, steps)
        assert_equal(ours, theirs)
        assert_same_state(optimizer, other)
    paging = optimizer.paging()
    assert paging["pager"] == pager
    assert paging["moved_out"] > 0


@pagers
@pytest.mark.parametrize(
    ("paged", "plain"), [(optim.PagedAdamW, optim.AdamW), (optim.PagedAdamW8bit, optim.AdamW8bit)]
)
def test_a_tensor_of_many_chunks(
    paged: type[PagedState], plain: type[NativeOptimizer], pager: str, on_emulator: None
) -> None:
    """A range for each moment, and for its scales, which are smaller: places of two sizes."""
    emulation.set_schedule("late")
    ours, theirs = parameters([(80_000,)]), parameters([(80_000,)])
    optimizer = paged(ours, pager=pager, device_budget=0, **SMALL)
    other = plain(theirs)
    train(optimizer, ours, range(1, 3))
    train(other, theirs, range(1, 3))
    assert_equal(ours, theirs)
    assert_same_state(optimizer, other)
    (arena,) = optimizer._arenas()
    assert arena.window < sum(chunk.bytes for chunk in arena.chunks)
    assert optimizer.paging()["moved_in"] == 2 * sum(chunk.bytes for chunk in arena.chunks)


def step(optimizer: PagedState, params: list[nn.Parameter], times: int) -> None:
    """With every gradient: all state is made at once, in one buffer."""
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(times):
        optimizer.step()


@pagers
def test_a_step_moves_what_does_not_stay_and_no_more(pager: str, on_emulator: None) -> None:
    optimizer, params = make(pager, 0)
    moved = []
    for _ in range(4):
        step(optimizer, params, 1)
        moved.append(optimizer.paging()["moved_in"])
    (arena,) = optimizer._arenas()
    one_step = sum(chunk.bytes for chunk in arena.chunks)
    assert moved == [one_step * n for n in (1, 2, 3, 4)]


@pagers
def test_pressure_frees_the_device(pager: str, on_emulator: None) -> None:
    """With everything resident: under a budget that falls, and when an allocation fails."""
    emulation.set_schedule("late")
    optimizer, params = make(pager, "auto")
    step(optimizer, params, 2)
    before = optimizer.paging()
    assert before["resident"] == sum(chunk.bytes for chunk in optimizer._arenas()[0].chunks)
    assert optimizer.pressure() == before["resident"]
    assert optimizer.paging()["resident"] == 0
    emulation.fail("allocation", 1)
    step(optimizer, params, 1)
    assert optimizer.paging()["resident"] == before["resident"]
    optimizer._options = dataclasses.replace(optimizer._options, device_budget=0)
    step(optimizer, params, 3)
    emulation.set_schedule("early")  # all that was sent away has left
    assert optimizer.paging()["resident"] <= optimizer._arenas()[0].working


@pagers
def test_the_budget_holds(pager: str, on_emulator: None) -> None:
    emulation.set_schedule("late")
    optimizer, params = make(pager, "100kB")
    step(optimizer, params, 4)
    (arena,) = optimizer._arenas()
    paging = optimizer.paging()
    assert paging["bytes"] > 220_000
    assert 0 < paging["resident"] <= arena.window <= 110_000
    assert arena.window < paging["bytes"] / 2


@pagers
def test_a_step_that_fails_leaves_the_state_in_order(pager: str, on_emulator: None) -> None:
    """Nothing stays acquired: the state can be saved, and a step can be taken again."""
    optimizer, params = make(pager, 0)
    step(optimizer, params, 1)
    for n in (1, 4, 9):
        emulation.fail("copy", n)
        with pytest.raises(RuntimeError, match="made this call fail"):
            step(optimizer, params, 1)
        assert all(torch.isfinite(s["exp_avg"]).all() for s in optimizer.state.values())
        assert optimizer.state_dict()["state"]
        step(optimizer, params, 1)


def test_what_stays_on_a_gpu_is_stepped_at_once(
    on_emulator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    apply = NativeOptimizer._apply
    monkeypatch.setattr(
        NativeOptimizer, "_apply", lambda self, *rest: (calls.append(1), apply(self, *rest))[1]
    )
    for budget, most in (("auto", 2), (0, 100)):
        optimizer, params = make("staged", budget)
        step(optimizer, params, 1)
        calls.clear()
        step(optimizer, params, 1)
        chunks = len(optimizer._arenas()[0].chunks)
        assert len(calls) == min(most, 1 + chunks)  # the first call has what is not paged: nothing


def test_the_pager_that_fits_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert choose_pager(gpu, None, 1000) == ("managed", "the first choice there")
    name, why = choose_pager(gpu, None, 1001)
    assert name == "staged" and "1001 bytes of state, 1000 are free" in why
    emulation.set_concurrent_managed_access(False)
    name, why = choose_pager(gpu, None, 1)
    emulation.set_concurrent_managed_access(True)
    assert name == "staged" and "concurrent managed access" in why
    assert choose_pager(gpu, "staged", 1) == ("staged", "as asked")


def test_without_managed_access(on_emulator: None) -> None:
    emulation.set_concurrent_managed_access(False)
    optimizer, params = make("managed", "auto")
    with pytest.raises(ValueError, match=r"not 'managed': .*no concurrent managed access"):
        train(optimizer, params, range(1))
    assert not optimizer.state
    optimizer, params = make("staged", "auto")
    train(optimizer, params, range(1))


def test_a_device_that_is_full(on_emulator: None) -> None:
    emulation.set_device_bytes(4096)
    optimizer, params = make("managed", "auto")
    with pytest.raises(MemoryError, match="'staged' takes no more than its window"):
        train(optimizer, params, range(1))
    optimizer, params = make("staged", "auto")
    with pytest.raises(MemoryError, match="out of memory"):
        train(optimizer, params, range(1))
    emulation.set_device_bytes(1 << 20)
    train(optimizer, params, range(1, 3))
