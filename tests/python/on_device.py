"""Runs our ops on a device, on copies of the CPU tensors that a test hands them.

A test makes its tensors on the CPU, calls an op and compares on the CPU. Within `OnDevice("cuda")`
each call of ours is taken up just before it reaches a backend: the whole STORAGE of every argument
is copied to the device, to an address that is the same modulo 64, and the argument becomes the same
view of it; results come back as CPU tensors, and so do the storages of what the op writes, margins
and all. So a view stays as misaligned as it is, the sentinels around an output stand around it on
the device too, and no test knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_ALIGNMENT = 64


def _bytes_of(tensor: Tensor) -> Tensor:
    """All of its storage."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


class Twins:
    """The copies that one call sees, one for each storage."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by address: its bytes, their copy

    def of(self, tensor: Tensor) -> Tensor:
        """The same view of the storage's copy."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._copies:
            here = _bytes_of(tensor)
            room = torch.empty(here.numel() + _ALIGNMENT, dtype=torch.uint8, device=self._device)
            begin = (address - room.data_ptr()) % _ALIGNMENT
            there = room[begin : begin + here.numel()]
            there.copy_(here)
            self._copies[address] = here, there
        _, there = self._copies[address]
        offset = there.storage_offset() + tensor.storage_offset() * tensor.element_size()
        twin = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return twin.set_(
            there.untyped_storage(), offset // tensor.element_size(), tensor.shape, tensor.stride()
        )

    def bring_back(self, tensor: Tensor) -> None:
        """Everything that the device now has in this tensor's storage."""
        here, there = self._copies[tensor.untyped_storage().data_ptr()]
        here.copy_(there)


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [t for t in argument if isinstance(t, Tensor)] if isinstance(argument, list) else []


class OnDevice(TorchDispatchMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "qlora_native":
            return func(*args, **kwargs)
        twins = Twins(self._device)

        def there(argument: Any) -> Any:
            return twins.of(argument) if isinstance(argument, Tensor) else argument

        results = func(*tree_map(there, args), **tree_map(there, kwargs))
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(given):
                    twins.bring_back(tensor)
        return tree_map(lambda r: r.cpu() if isinstance(r, Tensor) else r, results)
