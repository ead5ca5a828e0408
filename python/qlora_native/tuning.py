"""Measures every way of the CUDA backend to multiply by a 4-bit weight, and keeps the fastest.

Which way is taken depends on the weight's shape and on how many rows x has. The table that comes
with the package decides by counts of bytes and flops; `tune` decides by the card at hand, and what
it finds is used at once, and in later processes (tuned_ways.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_native import ops, tuned_ways
from qlora_native.files import default_cache_dir
from qlora_native.graph_timer import Call, graph_seconds
from qlora_native.linear import Linear4bit
from qlora_native.quant_state import NESTED_BLOCKSIZE
from qlora_native.tuned_ways import DIRECTIONS, Backend, Card, CudaBackend, Measured

# The ends of the classes of row counts; above the last the shipped table decides.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# A way must be that much faster than the shipped choice to replace it: less is noise.
_TIE = 1.01
_ROUNDS = 5
# Codes that pass every cache: each call of a round reads another copy of the weight.
_WORKING_SET = 256 << 20
_ENVIRONMENT = {"forward": "QLORA_CUDA_FORWARD", "backward_input": "QLORA_CUDA_BACKWARD"}

# packed, absmax, nested_absmax, nested_offset
Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# Seconds of the calls together.
Timer = Callable[[Sequence[Call]], float]


@dataclass(frozen=True)
class Shape:
    """A weight [n, k] as it is quantized."""

    n: int
    k: int
    blocksize: int = 64
    double_quant: bool = True


def tune(
    shapes: Iterable[Shape | tuple[int, int]] = (),
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    rows: Sequence[int] = ROWS,
    save: bool | Path = True,
    report: Callable[[str], object] | None = print,
    timer: Timer | None = None,
    backend: Backend | None = None,
    card: Card | None = None,
) -> list[Measured]:
    """Measure every way on the device, use the fastest of each case from now on, and save them.

    It changes the ways of the whole process while it measures: nothing else should use the device.

    Args:
        shapes: the weights, Shape or (n, k).
        model: one whose Linear4bit layers give more of them.
        dtype: of the activations.
        device: where it measures.
        rows: the ends of the classes of row counts; a choice holds from the end before it on.
        save: whether into the card's file, or the directory of another one. What the file has of
            other cases is kept.
        report: takes the table, a line a call; None: nothing does.
        timer, backend, card: in place of CUDA's own, for tests and the emulator.

    Returns:
        What was measured, a Measured for each direction, weight and class.

    Raises:
        ValueError: there is no shape to measure.
        RuntimeError: the build has no CUDA kernels.
    """
    weights = list(dict.fromkeys([*map(_as_shape, shapes), *(_shapes_of(model) if model else ())]))
    if not weights:
        raise ValueError("shapes must name a weight, or model must have a Linear4bit, got neither")
    device = torch.device(device)
    if backend is None:
        if "cuda_compiler" not in tuned_ways.build_info():
            raise RuntimeError("tune needs a build with CUDA kernels, and this one has none")
        backend = CudaBackend()
    index = _index(device)
    card = Card.of(index) if card is None else card
    timer = _best_of_rounds if timer is None else timer
    if report:
        report(HEAD)
    measured = []
    with _measuring(backend, index), torch.no_grad(), _current(device):
        for shape in weights:
            for case in _cases(shape, sorted(set(rows)), dtype, device):
                measured.append(_measure(case, backend, timer))
                if report:
                    report(line(measured[-1]))
    _keep(measured, save, backend, index, card)
    return measured


HEAD = "direction       dtype     [N, K], blocksize, scales                M  way"


def line(measured: Measured) -> str:
    """Of the table that `tune` prints."""
    m = measured
    weight = f"[{m.n}, {m.k}], {m.blocksize}, {'8-bit' if m.double_quant else 'fp32'}"
    times = [f"{way} {1e6 * s:.1f} µs" for way, s in sorted(m.seconds.items(), key=lambda i: i[1])]
    told = ", ".join([*times, *(f"{way} failed" for way in m.failed)])
    shipped = f" (shipped: {m.shipped})" if m.disagrees else ""
    return f"{m.direction:15} {m.dtype:9} {weight:32} {m.most_m:6}  {m.way}{shipped}: {told}"


# ---- one case ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    direction: str
    shape: Shape
    dtype: torch.dtype
    m: int
    calls: list[Call]


def _cases(
    shape: Shape, rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[_Case]:
    weights = _weights(shape, device)
    n, k = shape.n, shape.k

    def forward(x: Tensor, w: Weight) -> Call:
        return lambda: ops.linear_4bit(x, *w, n, shape.blocksize)

    def backward_input(grad: Tensor, w: Weight) -> Call:
        return lambda: ops.linear_4bit_backward_input(grad, *w, k, shape.blocksize)

    for direction, call, depth in ((DIRECTIONS[0], forward, k), (DIRECTIONS[1], backward_input, n)):
        for m in rows:
            left = torch.randn(m, depth, device=device).to(dtype)
            yield _Case(direction, shape, dtype, m, [call(left, w) for w in weights])


def _weights(shape: Shape, device: torch.device) -> list[Weight]:
    """Copies of random codes and scales: of the time of a product their values are no part."""
    n_bytes = -(-shape.n * shape.k // 2)
    n_blocks = -(-shape.n * shape.k // shape.blocksize)
    codes = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=device)
    nested, offset = None, None
    if shape.double_quant:
        absmax = torch.randint(0, 256, (n_blocks,), dtype=torch.uint8, device=device)
        nested = torch.full((-(-n_blocks // NESTED_BLOCKSIZE),), 0.01, device=device)
        offset = torch.full((1,), 0.05, device=device)
    else:
        absmax = torch.full((n_blocks,), 0.05, device=device)
    on_cpu = device.type == "cpu"
    copies = 1 if on_cpu else max(1, min(64, _WORKING_SET // max(1, n_bytes)))
    return [(codes.clone(), absmax.clone(), nested, offset) for _ in range(copies)]


def _measure(case: _Case, backend: Backend, timer: Timer) -> Measured:
    backend.force_way(case.direction, None)
    case.calls[0]()
    shipped = backend.last_way(case.direction)
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for way in backend.ways(case.direction):
        backend.force_way(case.direction, way)
        try:
            seconds[way] = timer(case.calls) / len(case.calls)
        except Exception as error:  # one that does not serve the case says so; others go on
            failed[way] = f"{type(error).__name__}: {error}".partition("\n")[0]
    shape = case.shape
    return Measured(
        case.direction, str(case.dtype).removeprefix("torch."), shape.double_quant, shape.n,
        shape.k, shape.blocksize, case.m, fastest(seconds, shipped), shipped, seconds, failed,
    )  # fmt: skip


def fastest(seconds: dict[str, float], shipped: str | None) -> str | None:
    """The shipped way where it is the fastest or as good as that."""
    if not seconds:
        return None
    best = min(seconds, key=seconds.__getitem__)
    if shipped in seconds and seconds[shipped] <= seconds[best] * _TIE:
        return shipped
    return best


def _best_of_rounds(calls: Sequence[Call]) -> float:
    return min(graph_seconds(calls, _ROUNDS))


# ---- around it -----------------------------------------------------------------------------------


def _as_shape(shape: Shape | tuple[int, int]) -> Shape:
    return shape if isinstance(shape, Shape) else Shape(*shape)


def _shapes_of(model: nn.Module) -> list[Shape]:
    return [
        Shape(layer.out_features, layer.in_features, layer.blocksize, layer.double_quant)
        for layer in model.modules()
        if isinstance(layer, Linear4bit)
    ]


def _index(device: torch.device) -> int:
    if device.index is not None or device.type == "cpu":
        return device.index or 0
    return torch.cuda.current_device()


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
    else:
        with torch.cuda.device(device):
            yield


@contextmanager
def _measuring(backend: Backend, index: int) -> Iterator[None]:
    """By the shipped table alone; afterwards as it was before."""
    before = tuned_ways.in_use(index)
    backend.set_choices(index, [])
    try:
        yield
    finally:
        for direction, variable in _ENVIRONMENT.items():
            backend.force_way(direction, os.environ.get(variable) or None)
        backend.set_choices(index, list(before.rows) if before else [])


def _keep(
    measured: list[Measured], save: bool | Path, backend: Backend, index: int, card: Card
) -> None:
    """Into the file, with what it has of other cases, and into use."""
    kept = {m.case: m for m in measured}
    source = "measured in this process"
    if save is not False:
        path = (default_cache_dir() if save is True else save) / tuned_ways.file_name(card)
        kept = {m.case: m for m in tuned_ways.read(path, card)} | kept
        try:
            tuned_ways.write(path, card, kept.values())
            source = str(path)
        except OSError as error:
            warnings.warn(f"the table of ways cannot be saved: {error}", stacklevel=3)
    if tuned_ways.enabled():
        tuned_ways.take_into_use(backend, index, source, tuned_ways.rows_of(kept.values()))
