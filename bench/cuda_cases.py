"""What the emulator counts: a case of each CUDA kernel, with the bars that it is held to.

The one list of them: bench.cuda_counts makes docs/cuda_counts.md of it, and tests hold its bars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_native import ops

BF16 = torch.bfloat16
VALUES = 64 * 4096
BYTES_BAR = 1.05  # times the least

Call = Callable[[], object]

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 1}


@dataclass(frozen=True)
class Case:
    """One call of an op, by the kernel that does its work."""

    kernel: str
    what: str
    make: Callable[[], Call]  # makes its data, too
    least: float  # bytes that have to cross the bus
    cached: float = 0  # bytes that it may ask for beyond BYTES_BAR, mostly out of a cache
    conflicts: int | None = 0  # bank conflicts at most; None: as its data have it
    why: str = ""  # it misses a bar
    ways: dict[str, str] = field(default_factory=dict)  # forced, by direction
    architecture: int = 80  # that the emulator pretends to have; the least for its ways
    multiply_adds: float = 0  # on the CUDA cores

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.what}"

    @property
    def most_bytes(self) -> float:
        return BYTES_BAR * self.least + self.cached


def _normal(*shape: int) -> Tensor:
    """Nearly normal values whose bits do not depend on the processor, as torch.randn's do."""
    a, b, c, d = (torch.rand(shape) for _ in range(4))
    return (a + b + c + d - 2) * 3**0.5


def _short(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BF16 else "fp32"


def _elementwise(dtype: torch.dtype) -> list[Case]:
    def quantize_4bit() -> Call:
        x = _normal(VALUES).to(dtype)
        return lambda: ops.quantize_4bit(x)

    def dequantize_4bit() -> Call:
        parts = ops.quantize_4bit(_normal(VALUES))
        return lambda: ops.dequantize_4bit(*parts, None, None, (VALUES,), dtype=dtype)

    def quantize_8bit() -> Call:
        x = _normal(VALUES).to(dtype)
        return lambda: ops.quantize_8bit(x)

    def dequantize_8bit() -> Call:
        parts = ops.quantize_8bit(_normal(VALUES))
        return lambda: ops.dequantize_8bit(*parts, dtype=dtype)

    four, eight = dtype.itemsize + 0.5 + 4 / 64, dtype.itemsize + 1 + 4 / 256
    look_ups = "8-bit codes and buckets are looked up at whatever banks the data need"
    tables = "11.9 kB of tables a block of threads, for 32,768 values here; " + look_ups
    return [
        Case("quantize_4bit", _short(dtype), quantize_4bit, four * VALUES),
        Case("dequantize_4bit", _short(dtype), dequantize_4bit, four * VALUES),
        Case("quantize_8bit", _short(dtype), quantize_8bit, eight * VALUES, cached=0.4 * VALUES,
             conflicts=None, why=tables),
        Case("dequantize_8bit", _short(dtype), dequantize_8bit, eight * VALUES,
             conflicts=None, why=look_ups),
    ]  # fmt: skip


def _double_quantized() -> Call:
    packed, absmax = ops.quantize_4bit(_normal(VALUES))
    scales = ops.quantize_scales(absmax)
    return lambda: ops.dequantize_4bit(packed, *scales, (VALUES,), dtype=BF16)


def _scales() -> list[Case]:
    def quantize() -> Call:
        absmax = torch.rand(VALUES)
        return lambda: ops.quantize_scales(absmax)

    def dequantize() -> Call:
        parts = ops.quantize_scales(torch.rand(VALUES))
        return lambda: ops.dequantize_scales(*parts)

    why = "the map and its buckets are looked up at whatever banks the data need"
    tables = "11.9 kB of tables a block of threads, for 32,768 values here; "
    return [
        Case("scales", "quantized, mean taken first", quantize, (9 + 4 / 256) * VALUES,
             cached=0.4 * VALUES, conflicts=None, why=tables + why),
        Case("scales", "dequantized", dequantize, (5 + 4 / 256) * VALUES,
             conflicts=None, why="the map is looked up at whatever banks the data need"),
    ]  # fmt: skip


def _adamw() -> Call:
    lists = [[torch.rand(VALUES)] for _ in range(4)]
    return lambda: ops.adamw_step(*lists, **HYPER)


def _adamw_8bit() -> Call:
    codes = [torch.randint(256, (VALUES,), dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.rand(VALUES // 256) for _ in range(2)]
    lists = [[t] for t in (_normal(VALUES), _normal(VALUES), *codes, *absmax)]
    return lambda: ops.adamw_8bit_step(*lists, **HYPER)


def _weight(
    n: int, k: int, double_quant: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    packed, absmax = ops.quantize_4bit(_normal(n, k) * 0.05)
    return (packed, *ops.quantize_scales(absmax)) if double_quant else (packed, absmax, None, None)


def _weight_bytes(n: int, k: int, double_quant: bool) -> float:
    return n * k * (0.5 + ((1 + 4 / 256) if double_quant else 4) / 64)


def _linear(way: str, m: int, n: int, k: int, double_quant: bool, **bars: object) -> Case:
    def make() -> Call:
        x, weight = _normal(m, k).to(BF16), _weight(n, k, double_quant)
        return lambda: ops.linear_4bit(x, *weight, n)

    scales = "double-quantized" if double_quant else "plain scales"
    least = _weight_bytes(n, k, double_quant) + 2 * m * (n + k)
    what = f"M = {m}, {n} × {k}, {scales}"
    return Case(f"linear_{way}", what, make, least, ways={"forward": way}, **bars)  # type: ignore[arg-type]


def few_rows(m: int, double_quant: bool) -> Case:
    """4096 is a depth of many steps whose scales are whole sectors."""
    n, k = 64, 4096
    x = m * k * 2
    blocks = n // 32  # each reads x; no margin for it
    look_ups = n * k // 64 // 32 if double_quant else 0  # of warps, in the map
    why = ["each block of 32 rows reads x again, out of the L2 cache"]
    if double_quant:
        why.append("the scales' map is looked up once for 64 values, at whatever banks those lie")
    return _linear(
        "few_rows", m, n, k, double_quant, cached=(blocks - BYTES_BAR) * x, conflicts=2 * look_ups,
        why="; ".join(why),
    )  # fmt: skip


def tiled(way: str, architecture: int) -> list[Case]:
    """A row of tiles, each of whose columns read x again; depths past the ring's stages."""
    m, n, k = 128, 512, 512
    columns = {"tiles": 128, "wgmma": 256}[way]  # of a tile

    def backward() -> Call:
        grad, weight = _normal(m, k).to(BF16), _weight(k, n, False)
        return lambda: ops.linear_4bit_backward_input(grad, *weight, n)

    least = _weight_bytes(n, k, False) + 2 * m * (n + k)
    again = (n // columns - 1) * m * k * 2 + n * k // 64 * 28  # of a scale's sector, 28 are others'
    why = (
        f"each tile of {columns} columns reads x again, and a scale comes with its sector, which "
        "has those of seven more steps: out of the L2 cache"
    )
    back = f"input gradient, M = {m}, {k} × {n}, plain scales"
    return [
        _linear(way, m, n, k, False, cached=again, why=why, architecture=architecture),
        Case(f"linear_{way}", back, backward, least, cached=again, why=why,
             ways={"backward_input": way}, architecture=architecture),
    ]  # fmt: skip


def _fma() -> list[Case]:
    m, n, k = 64, 64, 512

    def backward() -> Call:
        grad, weight = _normal(m, k).to(BF16), _weight(k, n, True)
        return lambda: ops.linear_4bit_backward_input(grad, *weight, n)

    least = _weight_bytes(n, k, True) + 2 * m * (n + k)
    scales = "a step asks for its scales by whole sectors, and looks the map up at any bank"
    codes = "32 values of a row, a step, are half a sector of codes; "
    return [
        _linear("fma", m, n, k, True, cached=0.45 * least, conflicts=None, why=codes + scales,
                multiply_adds=m * n * k),
        Case("linear_fma", f"input gradient, M = {m}, {k} × {n}, double-quantized", backward, least,
             cached=0.25 * least, conflicts=None, why=scales, ways={"backward_input": "fma"},
             multiply_adds=m * n * k),
    ]  # fmt: skip


def _lora() -> list[Case]:
    """The LoRA branch's gradients: lora_tensor, then lora_sums, which adds up the runs."""
    m, n, k, r = 512, 256, 256, 16

    def make(of_a: bool) -> Call:
        grad, x = _normal(m, n).to(BF16), _normal(m, k).to(BF16)
        u, a, b = _normal(m, r), _normal(r, k), _normal(n, r)
        weight = _weight(n, k, True)
        need = (False, of_a, True, True)
        return lambda: ops.qlora_linear_backward(
            grad, x, u, *weight, 64, "nf4", a, b, 2.0, 0.0, None, *need
        )

    tile = 128  # rows of a result
    small = 4 * m * r  # g or u, which each tile reads
    sums = 2 * 4 * r  # there and back, for each row of a result and run
    db, db_sums = 2 * m * n + small + 4 * n * r + 2 * n, sums * n + 2 * 4 * n
    db_cached = (n / tile - 1) * small + db_sums
    # g = scale * dy B: dy once more, B for each tile of rows; and g, a result and an operand.
    g, g_sums = 2 * m * n + 4 * n * r + small, sums * m + small / 2
    da, da_sums = 2 * m * k + small + 4 * k * r, sums * k
    da_cached = (k / tile - 1) * small + da_sums + (m / tile - 1) * 4 * n * r + g_sums
    why = (
        "each tile of 128 rows reads the small operand again, out of the L2 cache; sums of runs of "
        "the depth go to memory and back, as many bytes as 4 R / depth of a run are of 1"
    )
    return [
        Case("lora_tensor + lora_sums", f"dB and dbias, M = {m}, N = {n}, r = {r}",
             lambda: make(False), db, cached=db_cached, why=why),
        Case("lora_tensor + lora_sums", f"g, dA, dB and dbias, M = {m}, N = K = {n}, r = {r}",
             lambda: make(True), db + g + da, cached=db_cached + da_cached, why=why),
    ]  # fmt: skip


FEW_ROWS = [few_rows(m, double) for double in (True, False) for m in (1, 8)]
CASES = [
    *_elementwise(torch.float32),
    *_elementwise(BF16),
    Case("dequantize_4bit", "bf16, double-quantized", _double_quantized,
         (2.5 + (1 + 4 / 256) / 64) * VALUES, cached=0.3 * VALUES, conflicts=None,
         why="a warp asks for sectors of one-byte scales, of nested absmax and of the offset; "
             "the map is looked up at whatever banks those lie"),
    *_scales(),
    Case("adamw", "32-bit state, fp32", _adamw, 28 * VALUES),
    Case("adamw_8bit", "fp32", _adamw_8bit, (16 + 16 / 256) * VALUES, cached=0.5 * VALUES,
         conflicts=None,
         why="25.6 kB of tables a block of threads, for 32,768 values here and for millions in a "
             "model; codes are looked up at whatever banks the data need"),
    *FEW_ROWS,
    *tiled("tiles", 80),
    *tiled("wgmma", 90),
    *_fma(),
    *_lora(),
]  # fmt: skip
