"""The products in tiles on tensor cores, on the emulator, each by itself.

cuda/kernels/linear_tiles.cuh is made of mma.sync, linear_wgmma.cuh of Hopper's warpgroup products.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from linear_cases import (
    Case,
    Weight,
    assert_as_exact_as_plain,
    assert_backward_input,
    assert_forward,
    make_weight,
    rand,
)
from qlora_native import ops, reference

emulation = pytest.importorskip(
    "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

# The compute capability for which the emulator runs each of them.
WAYS = {"tiles": 80, "wgmma": 90}

# Tiles of 64, 128 and 256 rows, tails of rows, columns and depth in both directions, one step and
# more than the ring holds, panels of codes that take another's place, blocks across rows and larger
# than the weight.
CASES = {
    "less_than_a_step": Case(n=40, k=32, m=(1, 17), blocksize=32),
    "a_step_and_a_tail": Case(n=72, k=96, m=(9, 65), blocksize=32),
    "around_the_ring": Case(n=136, k=352, m=(33,)),
    "tiles_of_128_rows": Case(n=136, k=160, m=(65, 128), format="fp4"),
    "tiles_of_256_rows": Case(n=136, k=160, m=(129, 300), double_quant=False),
    "panels_along_rows": Case(n=24, k=544, m=(7,)),
    "panels_across_rows": Case(n=552, k=32, m=(7,), blocksize=32),
    "blocks_across_rows": Case(n=24, k=96, m=(5,), blocksize=256),
    "one_block_larger_than_w": Case(n=8, k=64, m=(70,), blocksize=4096, double_quant=False),
    "no_rows": Case(n=0, k=64, m=(8,), double_quant=False),
    "no_columns": Case(n=8, k=0, m=(8,), double_quant=False),
}


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    emulation.use(True)
    emulation.set_architecture(WAYS[request.param])
    emulation.force_way("forward", request.param)
    emulation.force_way("backward_input", request.param)
    yield request.param
    emulation.force_way("forward", None)
    emulation.force_way("backward_input", None)
    emulation.set_architecture(80)
    emulation.count(False)
    emulation.set_seed(0)
    emulation.use(False)


def multiply(x: Tensor, weight: Weight, case: Case, bias: Tensor | None = None) -> Tensor:
    return ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format, bias)


def multiply_back(grad_out: Tensor, weight: Weight, case: Case) -> Tensor:
    return ops.linear_4bit_backward_input(
        grad_out, *weight.parts, case.k, case.blocksize, case.format
    )


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    weight = make_weight(case)
    bias = rand(case.n, seed=1, dtype=dtype)
    for m in case.m:
        x = rand(m, case.k, seed=2, dtype=dtype)
        assert_forward(multiply(x, weight, case, bias), x, weight, bias, f"M={m}")


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_backward_input(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    weight = make_weight(case)
    for m in case.m:
        grad_out = rand(m, case.n, seed=3, dtype=dtype)
        assert_backward_input(multiply_back(grad_out, weight, case), grad_out, weight, f"M={m}")


@DTYPES
def test_columns_that_are_no_whole_pieces(dtype: torch.dtype) -> None:
    case = Case(n=139, k=64, m=())
    weight = make_weight(case)
    x = rand(21, case.k, seed=2, dtype=dtype)
    assert_forward(multiply(x, weight, case), x, weight, None)


# LoRA's operands are three times the rank wide: one panel and a half, three.
@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize(("m", "rank"), [(20, 16), (70, 30), (140, 5)])
def test_lora(m: int, rank: int, p: float, dtype: torch.dtype) -> None:
    case = Case(n=136, k=160, m=())
    weight = make_weight(case)
    a, b = rand(rank, case.k, seed=4, std=0.1), rand(case.n, rank, seed=5, std=0.1)
    x, grad_out = rand(m, case.k, seed=6, dtype=dtype), rand(m, case.n, seed=7, dtype=dtype)
    scale, seed = 1.75, 0x1234_5678_9ABC
    seeds = torch.tensor([seed])
    y, u = ops.qlora_linear(
        x, *weight.parts, case.blocksize, case.format, None, a, b, scale, p, seeds
    )
    grad_x = ops.qlora_linear_backward(
        grad_out, x, u, *weight.parts, case.blocksize, case.format, a, b, scale, p, seeds
    )[0]

    dense, da, db = weight.exact, a.double(), b.double()
    dropped = reference.dropout(x.double(), seed, p)
    gain = reference.dropout(torch.ones(m, case.k, dtype=torch.float64), seed, p)
    rounded = weight.rounded(dtype)
    assert_as_exact_as_plain(
        y,
        x @ rounded.T + (dropped @ da.T @ db.T * scale).to(dtype),
        x.double() @ dense.T + scale * dropped @ da.T @ db.T,
        x.double().abs() @ dense.abs().T + scale * dropped.abs() @ da.abs().T @ db.abs().T,
    )
    dy = grad_out.double()
    assert_as_exact_as_plain(
        grad_x,
        grad_out @ rounded + (gain * (scale * dy @ db @ da)).to(dtype),
        dy @ dense + gain * (scale * dy @ db @ da),
        dy.abs() @ dense.abs() + gain * (scale * dy.abs() @ db.abs() @ da.abs()),
    )


def test_the_order_of_threads_and_blocks_does_not_matter() -> None:
    case = Case(n=136, k=352, m=())
    weight = make_weight(case)
    x = rand(70, case.k, seed=8, dtype=torch.bfloat16)
    results = []
    for seed in range(3):
        emulation.set_seed(seed)
        results.append(multiply(x, weight, case))
    assert all(torch.equal(y, results[0]) for y in results[1:])


def test_nan_stays_in_its_row() -> None:
    case = Case(n=40, k=96, m=(), blocksize=32)
    weight = make_weight(case)
    x = rand(20, case.k, seed=9, dtype=torch.bfloat16)
    clean = multiply(x, weight, case)
    x[3, 7] = float("nan")
    y = multiply(x, weight, case)
    assert torch.isnan(y[3]).all()
    rest = [i for i in range(20) if i != 3]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize(
    ("k", "dtype", "offset", "architecture"),
    [
        pytest.param(80, torch.bfloat16, 0, None, id="K is no multiple of 32"),
        pytest.param(64, torch.float32, 0, None, id="fp32"),
        pytest.param(64, torch.bfloat16, 1, None, id="x is not aligned"),
        pytest.param(64, torch.float16, 0, 75, id="sm_75"),
    ],
)
def test_what_they_refuse(
    way: str, k: int, dtype: torch.dtype, offset: int, architecture: int | None
) -> None:
    case = Case(n=8, k=k, m=())
    weight = make_weight(case)
    emulation.set_architecture(architecture or WAYS[way])
    x = torch.zeros(2 * k + offset, dtype=dtype)[offset:].view(2, k)
    with pytest.raises(RuntimeError, match="does not serve"):
        multiply(x, weight, case)


@pytest.mark.parametrize("architecture", [80, 89, 100, 120])
def test_warpgroups_are_hoppers(way: str, architecture: int) -> None:
    case = Case(n=8, k=64, m=())
    weight = make_weight(case)
    emulation.set_architecture(architecture)
    x = rand(2, 64, seed=1, dtype=torch.bfloat16)
    if way == "wgmma":
        with pytest.raises(RuntimeError, match="does not serve"):
            multiply(x, weight, case)
    else:
        assert_forward(multiply(x, weight, case), x, weight, None)


def test_a_gradient_of_rows_that_are_no_whole_pieces_is_refused() -> None:
    case = Case(n=12, k=64, m=())
    with pytest.raises(RuntimeError, match="does not serve"):
        multiply_back(torch.zeros(2, 12, dtype=torch.bfloat16), make_weight(case), case)


# The least is W's codes, once for a tile of rows, and the result; x or grad_out is read for each
# 128 columns, out of the second-level cache. A scale is read with its sector, which has those of
# the next steps too: the cache has it for them.
@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
def test_it_reads_the_weight_once_without_bank_conflicts(direction: str, m: int) -> None:
    case = Case(n=256, k=512, m=(), double_quant=False)
    if direction == "backward_input":
        case = Case(n=512, k=256, m=(), double_quant=False)
    weight = make_weight(case)
    x = rand(m, 512, seed=10, dtype=torch.bfloat16)
    emulation.count(True)
    multiply(x, weight, case) if direction == "forward" else multiply_back(x, weight, case)
    counts = emulation.counts()
    scales = case.n * case.k // 64 * 32
    least = case.n * case.k // 2 + 2 * m * 256
    x_bytes = 2 * m * 512 * 2
    moved = 32 * (counts["loaded_sectors"] + counts["stored_sectors"])
    assert moved <= least + x_bytes + scales
    assert counts["bank_conflicts"] == 0
