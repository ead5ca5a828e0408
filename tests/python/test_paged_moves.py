"""Paged state on its way: through safetensors, to the plain optimizer and back, between pagers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimizers import assert_equal, copies
from qlora_native import optim
from qlora_native.optim.native import NativeOptimizer
from qlora_native.optim.paged_state import PagedState
from test_paged_optim import SMALL, assert_same_state, each, groups, parameters, train

# Of a chunk of many, of many chunks, and in between.
SIZES = [(1,), (60, 67), (4096,), (255,), (30_000,), (63, 65)]
CHUNKS: dict[str, Any] = SMALL | {"chunk_bytes": 1 << 13}


def through_safetensors(state_dict: dict[str, Any], file: Path) -> dict[str, Any]:
    """As trainers do it: tensors in the file, numbers in its header."""
    tensors = {
        f"{i}.{key}": value
        for i, state in state_dict["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, file)
    loaded: dict[str, Any] = {
        "state": {
            i: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for i, state in state_dict["state"].items()
        },
        "param_groups": state_dict["param_groups"],
    }
    with safe_open(file, framework="pt") as saved:
        for name in saved.keys():  # noqa: SIM118 - it is no dict
            i, key = name.split(".")
            loaded["state"][int(i)][key] = saved.get_tensor(name)
    return loaded


@each
def test_through_safetensors(
    paged: type[PagedState], plain: type[NativeOptimizer], tmp_path: Path
) -> None:
    """From the paged memory itself, with most of it paged out, into another's."""
    ours, theirs = parameters(SIZES), parameters(SIZES)
    optimizer = paged(groups(ours), lr=1e-2, device_budget=0, **CHUNKS)
    other = plain(groups(theirs), lr=1e-2)
    train(optimizer, ours, range(4))
    train(other, theirs, range(4))
    optimizer.pressure()
    saved = through_safetensors(optimizer.state_dict(), tmp_path / "state.safetensors")
    again = copies(ours)
    last = paged(groups(again), lr=5.0, device_budget=0, **CHUNKS)
    last.load_state_dict(saved)
    assert_same_state(last, other)
    assert set(last._slots) == set(last.state) != set()
    train(last, again, range(4, 7))
    train(other, theirs, range(4, 7))
    assert_equal(again, theirs)
    assert_same_state(last, other)


# Each of the four to each other once.
ROUTE = (
    *("plain", "file", "managed", "staged", "plain", "managed", "plain", "staged", "managed"),
    *("file", "staged", "file", "plain"),
)


@pytest.fixture
def emulator() -> Iterator[Any]:
    made = pytest.importorskip(
        "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
    )
    made.take_faults()
    made.set_schedule("drawn", 3)
    yield made
    made.set_schedule("early")
    made.use(False)
    assert made.take_faults() == []


@pytest.mark.parametrize(
    ("paged", "plain"), [(optim.PagedAdamW, optim.AdamW), (optim.PagedAdamW8bit, optim.AdamW8bit)]
)
def test_from_place_to_place(
    paged: type[PagedState], plain: type[NativeOptimizer], emulator: Any
) -> None:
    """A step in each, on the CPU or the GPU: the state arrives to the bit, and the run goes on."""
    theirs = parameters(SIZES)
    other = plain(groups(theirs), lr=1e-2)
    state, params = other.state_dict(), theirs
    for n, place in enumerate(ROUTE):
        params = copies(params)
        chosen = {} if place == "plain" else CHUNKS | {"pager": place, "device_budget": 0}
        optimizer = (paged if chosen else plain)(groups(params), **chosen)
        emulator.use(place in ("managed", "staged"))
        optimizer.load_state_dict(state)
        assert_same_state(optimizer, other)
        train(optimizer, params, range(n, n + 1))
        state = optimizer.state_dict()
        if isinstance(optimizer, PagedState):
            assert optimizer.paging()["pager"] == place
        emulator.use(False)
        train(other, theirs, range(n, n + 1))
        assert_equal(params, theirs)
    assert_same_state(optimizer, other)
