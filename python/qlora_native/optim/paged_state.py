"""Paged state for any rule: large tensors' state gives way, and a step goes through it in chunks.

    for chunk i of the plan:  prefetch i + 1,  step i by the rule's own op,  evict i

Chunks stay as long as the budget holds all of them. Where it does not, the first of them stay and
the rest come and go: in a step that passes through all in turn that moves least, where dropping
what was used longest ago would move everything.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native.optim.native import Layout, NativeOptimizer, Update
from qlora_native.paging import Arena, parse_budget
from qlora_native.paging.arena import Place
from qlora_native.paging.budget import free_for_state
from qlora_native.paging.pagers import choose_pager
from qlora_native.paging.plan import CHUNK_BYTES

MIN_PAGED_SIZE = 100_000  # values, as bitsandbytes has it


@dataclass(frozen=True)
class PagingOptions:
    """See PagedState."""

    device_budget: int | str = "auto"
    min_paged_size: int = MIN_PAGED_SIZE
    pager: str | None = None
    paging_directory: str | None = None
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        parse_budget(self.device_budget)
        if self.min_paged_size < 0:
            raise ValueError(f"min_paged_size must not be negative, got {self.min_paged_size}")
        if self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be more than 0, got {self.chunk_bytes}")


@dataclass(frozen=True)
class _Slot:
    """A parameter's place in an arena."""

    arena: Arena
    index: int

    def holds(self, state: Mapping[str, Any]) -> bool:
        return all(state.get(key) is t for key, t in self.arena.tensors[self.index].items())


# A chunk of an arena, and the state of each of its pieces.
_Present = tuple[Arena, int, list[dict[str, Tensor]]]


def _acquire(run: Iterable[tuple[Arena, int]]) -> list[_Present]:
    """All of them, or, if it raises, none."""
    present: list[_Present] = []
    try:
        for arena, i in run:
            present.append((arena, i, arena.acquire(i)))
    except Exception:
        for arena, i, _ in present:
            arena.release(i)
        raise
    return present


class PagedState(NativeOptimizer):
    """Mixed into an optimizer, before it; the arguments are that one's, and these by name:

    Args:
        device_budget: what of the state may stay in the memory of the parameters' device: "2GB",
            "512MiB", a number of bytes, or "auto": what is free when a step begins, less a
            reserve. Some chunks are there in any case while the step passes.
        min_paged_size: state of tensors with fewer values is not paged.
        pager: "file" for parameters on a CPU; "managed" or "staged" on a GPU; None: what fits.
        paging_directory: on a disk, with room for the state ("file"); None: what TMPDIR names, or
            /var/tmp. What is written there has no name, and is gone with the process.
        chunk_bytes: what a step brings at once.

    State in `self.state` and in `state_dict()` is ordinary tensors, on the host. State that was
    loaded, copied or unpickled is paged as before.

    Raises (at the step that makes state, and when state is loaded or copied):
        OSError: the directory cannot be written, or its disk is full.
        MemoryError: there is not enough memory for the state ("managed", "staged").
        ValueError: an argument is out of its range, or no such pager serves the device.
    """

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        device_budget: int | str = "auto",
        min_paged_size: int = MIN_PAGED_SIZE,
        pager: str | None = None,
        paging_directory: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        **settings: Any,
    ) -> None:
        self._options = PagingOptions(
            device_budget, min_paged_size, pager, paging_directory, chunk_bytes
        )
        self._slots: dict[Tensor, _Slot] = {}
        super().__init__(params, *arguments, **settings)

    # ---- what the user sees and does ------------------------------------------------------------

    def paging(self) -> dict[str, Any]:
        """Where the paged state is and what has moved.

        pager       its name; None before there is state
        why         it is that one
        bytes       of state that is paged
        resident    of these in the device's memory now ("file": in RAM)
        paged_out   the rest
        moved_in, moved_out     bytes, since the state was made
        waited      seconds the step waited for what moves ("file", where the host waits)
        budget      bytes that may stay; None before there is state
        """
        arenas = self._arenas()
        stats = [arena.buffer.stats() for arena in arenas]
        total = {
            key: sum(each[key] for each in stats)
            for key in ("bytes", "resident", "moved_in", "moved_out", "waited_ns")
        }
        return {
            "pager": arenas[0].buffer.pager if arenas else None,
            "why": arenas[0].why if arenas else None,
            "bytes": total["bytes"],
            "resident": total["resident"],
            "paged_out": total["bytes"] - total["resident"],
            "moved_in": total["moved_in"],
            "moved_out": total["moved_out"],
            "waited": total["waited_ns"] / 1e9,
            "budget": sum(self._budgets(arenas).values()) if arenas else None,
        }

    def pressure(self) -> int:
        """Page everything out, because an allocation failed; returns the bytes that left.

        torch's cache on the GPU is emptied too. The next step brings back what its budget allows.
        """
        before = self.paging()["resident"]
        for arena in self._arenas():
            arena.evict_all()
        torch.cuda.empty_cache()  # nothing where CUDA is not in use
        return max(0, int(before - self.paging()["resident"]))

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; the tensors are the paged state itself, brought up to date."""
        self._sync()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of the plain optimizer, whose state it takes too; stays paged.

        Raises what PagedState does, too; nothing is changed then.
        """
        super().load_state_dict(state_dict)
        self._slots = {param: slot for param, slot in self._slots.items() if param in self.state}

    # ---- the step -------------------------------------------------------------------------------

    def _updates(self) -> list[Update]:
        self._adopt()
        return super()._updates()

    def _apply(self, updates: Iterable[Update], grad_scale: Tensor | None) -> None:
        updates = list(updates)
        paged = {self._slots[u.param]: u for u in updates if u.param in self._slots}
        super()._apply((u for u in updates if u.param not in self._slots), grad_scale)
        flat: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for present in self._walk(paged):
            pieces = []
            for arena, i, states in present:
                for piece, state in zip(arena.chunks[i].pieces, states, strict=True):
                    update = paged.get(_Slot(arena, piece.tensor))
                    if update is None:
                        continue
                    param, grad = update.param, update.grad
                    if not piece.whole:
                        if param not in flat:
                            flat[param] = param.view(-1), grad.reshape(-1)
                        param, grad = (t[piece.begin : piece.end] for t in flat[param])
                    pieces.append(Update(param, grad, update.group, state, update.progress))
            super()._apply(pieces, grad_scale)

    def _walk(self, stepped: Container[_Slot]) -> Iterator[list[_Present]]:
        """Each chunk with a tensor that is stepped, present while it is the caller's.

        One by one; on a GPU those that stay together, for one launch.
        """
        arenas = self._arenas()
        todo = [
            (arena, i)
            for arena in arenas
            for i, chunk in enumerate(arena.chunks)
            if any(_Slot(arena, piece.tensor) in stepped for piece in chunk.pieces)
        ]
        stay = self._staying(arenas)
        n = 0
        while n < len(todo):
            first = todo[n][0]
            run = [(a, i) for a, i in todo[n:] if a is first and a.at_once and i < stay[a]]
            run = run or todo[n : n + 1]
            try:
                present = _acquire(run)
            except MemoryError:  # the budget is more than there is: by as little as can be
                stay = dict.fromkeys(arenas, 0)
                self.pressure()
                run = todo[n : n + 1]
                present = _acquire(run)
            n += len(run)
            try:
                if n < len(todo):
                    following, j = todo[n]
                    following.prefetch(j)
                yield present
            finally:
                for arena, i in run:
                    arena.release(i)
            for arena, i in run:
                if i >= stay[arena]:
                    arena.evict(i)

    def _staying(self, arenas: Iterable[Arena]) -> dict[Arena, int]:
        """For each arena how many of its chunks stay, the first ones."""
        stay = {}
        for arena, budget in self._budgets(arenas).items():
            stay[arena] = len(arena.chunks)
            if arena.plan.bytes <= budget:
                continue
            left = min(budget, arena.window) - arena.working
            for n, chunk in enumerate(arena.chunks):
                left -= chunk.bytes
                if left < 0:
                    stay[arena] = n
                    break
        return stay

    def _budgets(self, arenas: Iterable[Arena]) -> dict[Arena, int]:
        """What each may keep; one device's budget goes to its arenas in turn."""
        budgets, left = {}, {}
        for arena in arenas:
            if arena.device not in left:
                left[arena.device] = self._budget(arena.device)
            budgets[arena] = left[arena.device]
            left[arena.device] = max(0, left[arena.device] - arena.plan.bytes)
        return budgets

    def _budget(self, device: torch.device) -> int:
        given = parse_budget(self._options.device_budget)
        if given is not None:
            return given
        resident = sum(
            arena.buffer.stats()["resident"]
            for arena in self._arenas()
            if arena.device == device and device.type == "cuda"
        )
        return free_for_state(device, resident)

    # ---- the state ------------------------------------------------------------------------------

    def _arenas(self) -> list[Arena]:
        """In the order in which they were made; one is gone with its last parameter."""
        return list(dict.fromkeys(slot.arena for slot in self._slots.values()))

    def _sync(self) -> None:
        for arena in self._arenas():
            arena.sync()

    def _new_states(self, layouts: Mapping[Tensor, Layout]) -> dict[Tensor, dict[str, Any]]:
        least = max(1, self._options.min_paged_size)
        paged = {param: layout for param, layout in layouts.items() if param.numel() >= least}
        states = super()._new_states({p: layouts[p] for p in layouts if p not in paged})
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for param in paged:
            by_device[param.device].append(param)
        slots: dict[Tensor, _Slot] = {}
        for device, params in by_device.items():
            arena = self._new_arena(device, params, paged)
            for i, param in enumerate(params):
                slots[param] = _Slot(arena, i)
                states[param] = self._constants(param, layouts[param]) | arena.tensors[i]
        self._slots.update(slots)
        return {param: states[param] for param in layouts}

    def _new_arena(
        self, device: torch.device, params: list[Tensor], layouts: Mapping[Tensor, Layout]
    ) -> Arena:
        options = self._options
        n_bytes = sum(
            math.prod(shape) * dtype.itemsize
            for param in params
            for shape, dtype in layouts[param].values()
        )
        pager, why = choose_pager(device, options.pager, n_bytes)
        place = Place(pager, device, options.paging_directory, options.chunk_bytes, why)
        taken = sum(arena.plan.bytes for arena in self._arenas() if arena.device == device)
        budget = max(0, self._budget(device) - taken)
        return Arena(place, [layouts[p] for p in params], [p.numel() for p in params], budget)

    def _adopt(self) -> None:
        """Page state that came from elsewhere: set by the user, or of a copy of this optimizer."""
        strangers: dict[Tensor, tuple[Layout, dict[str, Any]]] = {}
        for param, state in self.state.items():
            if not state or param.numel() < max(1, self._options.min_paged_size):
                continue
            slot = self._slots.get(param)
            if slot is None or not slot.holds(state):
                layout: Layout = {
                    key: (state[key].shape, state[key].dtype)
                    for key in (*self.moments, *self._absmax())
                    if key in state
                }
                strangers[param] = layout, dict(state)
        if strangers:
            self.state.update(self._copied_states(strangers))

    def __getstate__(self) -> dict[str, Any]:
        self._sync()
        return {**super().__getstate__(), "paging": asdict(self._options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.pop("paging", None)  # load_state_dict gives none
        if options is not None:
            self._options, self._slots = PagingOptions(**options), {}
        super().__setstate__(state)
        if options is not None:
            self._adopt()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedState:
        # Paged tensors are handed over as they are, and copied from one arena into the next: no
        # second copy of all state is ever in memory.
        paged = [t for arena in self._arenas() for state in arena.tensors for t in state.values()]
        memo.update({id(tensor): tensor for tensor in paged})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for tensor in paged:
            del memo[id(tensor)]
        return twin
