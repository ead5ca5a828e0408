"""The ways of the 4-bit product that `tune` found fastest on a card: their file, and their use.

A file belongs to one card's name, its architecture and this package's version, and lies in
$QLORA_NATIVE_CACHE, else in qlora_native of the XDG cache directory. Where the build has CUDA and
torch too, importing the package asks torch to have the file loaded as soon as CUDA starts in the
process; nothing is read, and CUDA is not started, before. QLORA_CUDA_TUNING=0 turns that off.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_native import _core
from qlora_native.files import default_cache_dir, write_file

DIRECTIONS = ("forward", "backward_input")
SWITCH = "QLORA_CUDA_TUNING"
_LAYOUT = 1  # raise it when an older file must not be read any more

# direction, dtype, double_quant, n, k, blocksize, most_m, way
Row = tuple[str, str, bool, int, int, int, int, str]


class Backend(Protocol):
    """The CUDA backend, as what measures and sets its ways sees it; the emulated one is another."""

    def ways(self, direction: str) -> list[str]: ...
    def force_way(self, direction: str, name: str | None) -> None: ...
    def last_way(self, direction: str) -> str | None: ...
    def set_choices(self, device: int, rows: list[Row]) -> None: ...


class CudaBackend:
    """That of this build."""

    def __init__(self) -> None:
        self._forced: dict[str, str | None] = dict.fromkeys(DIRECTIONS)

    def ways(self, direction: str) -> list[str]:
        key = "cuda_linear_ways" if direction == "forward" else "cuda_backward_input_ways"
        return list(_core.build_info()[key])

    def force_way(self, direction: str, name: str | None) -> None:
        self._forced[direction] = name
        _core.force_cuda_linear(*(self._forced[d] for d in DIRECTIONS))

    def last_way(self, direction: str) -> str | None:
        return _core.last_cuda_linear_way(direction)

    def set_choices(self, device: int, rows: list[Row]) -> None:
        _core.set_cuda_linear_choices(device, rows)


@dataclass(frozen=True)
class Card:
    name: str
    architecture: int  # 80, 90, …

    @staticmethod
    def of(device: int) -> Card:
        major, minor = torch.cuda.get_device_capability(device)
        return Card(torch.cuda.get_device_name(device), 10 * major + minor)


@dataclass(frozen=True)
class Measured:
    """What came of one case: a weight [n, k] and a class of row counts that ends at most_m."""

    direction: str  # "forward" or "backward_input"
    dtype: str  # "float32", "float16" or "bfloat16": of the activations
    double_quant: bool
    n: int
    k: int
    blocksize: int
    most_m: int
    way: str | None  # the fastest; None where every way failed
    shipped: str | None  # what the table that comes with the package takes
    seconds: dict[str, float]  # of a call, by way
    failed: dict[str, str]  # the ways that cannot, and why

    @property
    def case(self) -> tuple[Any, ...]:
        return (self.direction, self.dtype, self.double_quant, self.n, self.k, self.blocksize,
                self.most_m)  # fmt: skip

    @property
    def disagrees(self) -> bool:
        return self.way is not None and self.way != self.shipped


def enabled() -> bool:
    return os.environ.get(SWITCH) != "0"


# ---- the file ------------------------------------------------------------------------------------


def file_name(card: Card) -> str:
    name = re.sub(r"[^A-Za-z0-9]+", "-", card.name).strip("-")
    return f"cuda_ways-sm{card.architecture}-{name}-{_version()}.json"


def write(path: Path, card: Card, measured: Iterable[Measured]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**_made_by(card), "measured": [asdict(m) for m in measured]}
    write_file(path, json.dumps(record, indent=1) + "\n")


def read(path: Path, card: Card) -> list[Measured]:
    """What the file has for this card; nothing, with a warning, where it is not one of its own."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key, ours in _made_by(card).items():
            if record[key] != ours:
                raise ValueError(f"its {key} is {record[key]!r}, here it is {ours!r}")
        return [_checked(entry) for entry in record["measured"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _ignore(path, error)
        return []


def _made_by(card: Card) -> dict[str, Any]:
    return {"layout": _LAYOUT, "version": _version(), "card": card.name,
            "architecture": card.architecture}  # fmt: skip


def _version() -> str:
    import qlora_native

    return qlora_native.__version__


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "str | None": (str, type(None)),
    "dict[str, float]": (dict,), "dict[str, str]": (dict,),
}  # fmt: skip


def _checked(entry: dict[str, Any]) -> Measured:
    measured = Measured(**entry)
    for field in fields(Measured):
        value = getattr(measured, field.name)
        if type(value) not in _TYPES[str(field.type)]:
            raise TypeError(f"{field.name} must be {field.type}, got {value!r}")
    return measured


def _ignore(path: Path, error: Exception) -> None:
    warnings.warn(
        f"{path} is no table of ways for this card and build, and is ignored ({error}); "
        "qlora_native.tune() writes a new one",
        stacklevel=3,
    )


# ---- the table in use ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    source: str
    rows: tuple[Row, ...]


_in_use: dict[int, Table] = {}  # by device


def rows_of(measured: Iterable[Measured]) -> list[Row]:
    return [(*m.case, m.way) for m in measured if m.way is not None]


def in_use(device: int) -> Table | None:
    return _in_use.get(device)


def take_into_use(backend: Backend, device: int, source: str, rows: Sequence[Row]) -> None:
    """From now on products on that device go by these rows, and by the shipped table elsewhere."""
    backend.set_choices(device, list(rows))
    if rows:
        _in_use[device] = Table(source, tuple(rows))
    else:
        _in_use.pop(device, None)


def load(backend: Backend, device: int, card: Card) -> None:
    """What the card's file has, where there is one; a file that is no good is ignored."""
    path = default_cache_dir() / file_name(card)
    rows = rows_of(read(path, card))
    if rows:
        try:
            take_into_use(backend, device, str(path), rows)
        except (ValueError, TypeError) as error:  # such as a way that this build does not have
            _ignore(path, error)


def describe() -> str:
    if not enabled():
        return f"off by {SWITCH}=0: the shipped table"
    tables = [f"device {d}: {t.source} ({len(t.rows)} cases)" for d, t in sorted(_in_use.items())]
    return "; ".join(tables) or "none loaded: the shipped table"


def build_info() -> dict[str, Any]:
    """How this build was made and what it can use here; with CUDA, which tuned tables it has."""
    info = _core.build_info()
    if "cuda_compiler" in info:
        info["cuda_tuning"] = describe()
    return info


# ---- when it is loaded ---------------------------------------------------------------------------


def load_for_all() -> None:
    """The file of every card that is here. What goes wrong is no reason for CUDA not to start."""
    try:
        backend = CudaBackend()
        for device in range(torch.cuda.device_count()):
            load(backend, device, Card.of(device))
    except Exception as error:  # such as a user without a home
        warnings.warn(f"qlora_native loads no tuned table of ways: {error}", stacklevel=2)


def when_cuda_starts(call: Callable[[], None] = load_for_all) -> bool:
    """Has torch make that call once CUDA starts in this process; whether there will be any."""
    with_cuda = torch.version.cuda is not None and "cuda_compiler" in _core.build_info()
    if with_cuda and enabled():
        torch.cuda._lazy_call(call)  # type: ignore[no-untyped-call]
        return True
    return False
