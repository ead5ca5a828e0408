"""The CUDA kernel for few rows (cuda/kernels/linear_few_rows.cuh), on the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_cases import Case, Weight, assert_forward, make_weight, rand
from planted_faults import Build, Mutant, assert_caught, build, each, mutant
from qlora_native import ops

emulation = pytest.importorskip(
    "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

# Each shape of the kernel (8, 16, 32, 64 columns), its tails of rows, columns and depth, units of
# 64 and of 32 values, scales one by one and in fours, and depths that blocks share.
CASES = {
    "a_step_and_a_tail": Case(n=40, k=576, m=(1, 3, 8)),
    "all_shapes": Case(n=70, k=320, m=(2, 9, 17, 33, 64), format="fp4"),
    "units_of_32": Case(n=45, k=96, m=(1, 12, 32), blocksize=32),
    "half_a_unit_over": Case(n=33, k=608, m=(5,)),
    "blocks_across_rows": Case(n=19, k=96, m=(4, 9), blocksize=256),
    "one_block_larger_than_w": Case(n=9, k=64, m=(1, 8), blocksize=4096),
    "plain_scales": Case(n=33, k=256, m=(4, 31), blocksize=128, double_quant=False),
    "plain_scales_in_fours": Case(n=40, k=2560, m=(3,), double_quant=False),
    "scales_in_fours": Case(n=70, k=2304, m=(2, 12)),
    "shared_depth": Case(n=9, k=16384 + 64, m=(2,)),
    "shared_depth_more_columns": Case(n=130, k=8192, m=(20,)),
}


@pytest.fixture(autouse=True)
def few_rows() -> Iterator[None]:
    emulation.use(True)
    emulation.force_way("forward", "few_rows")
    yield
    emulation.force_way("forward", None)
    emulation.count(False)
    emulation.set_seed(0)
    emulation.use(False)


def multiply(x: Tensor, weight: Weight, case: Case, bias: Tensor | None = None) -> Tensor:
    return ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format, bias)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_plain_path(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    weight = make_weight(case)
    bias = rand(case.n, seed=1, dtype=dtype)
    for m in case.m:
        x = rand(m, case.k, seed=2, dtype=dtype)
        assert_forward(multiply(x, weight, case, bias), x, weight, bias, f"M={m}")


@DTYPES
@pytest.mark.parametrize(("format", "units"), [("nf4", 0.53), ("fp4", 0.01)])
@pytest.mark.parametrize("size", [1.0, 2.0**-18])
def test_its_error_is_the_codebooks_rounding(
    size: float, format: str, units: float, dtype: torch.dtype
) -> None:
    """docs/numerics.md: a value errs by its code's rounding, so many units of roundoff relative to
    itself, whatever its scale: small weights lose nothing to fp16's subnormals."""
    case = Case(n=48, k=1024, m=(), format=format, double_quant=False)
    weight = make_weight(case)
    scales = weight.absmax * size
    exact = weight.exact * size
    x = rand(4, case.k, seed=3, dtype=dtype)
    y = ops.linear_4bit(x, weight.packed, scales, None, None, case.n, 64, format, None)
    wanted, magnitude = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    roundoff = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = units * roundoff + 4 * torch.finfo(torch.float32).eps
    result = roundoff * wanted.abs() * (1 + allowed) + smallest / 2
    assert ((y.double() - wanted).abs() <= allowed * magnitude + result).all()


def test_the_order_of_threads_and_blocks_does_not_matter() -> None:
    case = CASES["shared_depth"]
    weight = make_weight(case)
    x = rand(2, case.k, seed=4, dtype=torch.bfloat16)
    results = []
    for seed in range(3):
        emulation.set_seed(seed)
        results.append(multiply(x, weight, case))
    assert all(torch.equal(y, results[0]) for y in results[1:])


def test_nan_stays_in_its_row() -> None:
    case = Case(n=40, k=576, m=())
    weight = make_weight(case)
    x = rand(5, case.k, seed=5, dtype=torch.bfloat16)
    clean = multiply(x, weight, case)
    x[3, 7] = float("nan")
    y = multiply(x, weight, case)
    assert torch.isnan(y[3]).all()
    rest = [0, 1, 2, 4]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize(
    ("case", "m", "dtype", "offset"),
    [
        pytest.param(Case(n=8, k=64, m=()), 65, torch.bfloat16, 0, id="65 rows"),
        pytest.param(Case(n=8, k=80, m=()), 1, torch.bfloat16, 0, id="K is no multiple of 32"),
        pytest.param(Case(n=8, k=64, m=()), 1, torch.float32, 0, id="fp32"),
        pytest.param(Case(n=8, k=64, m=()), 1, torch.bfloat16, 1, id="x is not aligned"),
        pytest.param(Case(n=8, k=96, m=(), blocksize=32), 33, torch.bfloat16, 0, id="units of 32"),
    ],
)
def test_what_it_refuses(case: Case, m: int, dtype: torch.dtype, offset: int) -> None:
    weight = make_weight(case)
    x = torch.zeros(m * case.k + offset, dtype=dtype)[offset:].view(m, case.k)
    with pytest.raises(RuntimeError, match="does not serve"):
        multiply(x, weight, case)


# ---- faults planted in the kernel ----------------------------------------------------------------


def planted(name: str, file: str, old: str, new: str, caught_by: str) -> Mutant:
    return mutant(name, file, old, new, "linear_few_rows", caught_by)


KERNEL = "linear_few_rows"
COPY = "      copy((stage + kStages - 1) % kStages, step + kStages - 1);\n"
SYNC = "      sync_block();  // this stage is there; the one before is free; the panel is there\n"
MUTANTS = [
    planted("a stage filled before all have read it", KERNEL, SYNC + COPY, COPY + SYNC, "race"),
    planted("waits for a group too few", KERNEL, "wait_copies<kStages - 2>",
            "wait_copies<kStages - 1>", "in flight"),
    planted("no group where there is no step", KERNEL, "    }\n    commit_copies();",
            "    commit_copies();}\n", "in flight"),
    planted("no barrier after the wait", KERNEL, SYNC, "", "in flight"),
    planted("the map without its barrier", KERNEL, "  sync_block();  // the map\n", "",
            "uninitialised"),
    planted("a panel stored before all have read the last", KERNEL,
            "        sync_block();  // nobody reads the panel any more\n", "", "race"),
    planted("sums stored over a table that is read", KERNEL,
            "  sync_block();  // the table and the ring are not read any more\n", "", "race"),
    planted("sums added before they are there", KERNEL,
            "  sync_block();\n  const std::int64_t row_sets", "  const std::int64_t row_sets",
            "race"),
    planted("partial sums of all blocks in one place", KERNEL, "(split * row_sets + row_set)",
            "row_set", "race on global memory"),
    planted("the LoRA term from each block", KERNEL, "if (split == 0) add", "add", "digest"),
    planted("scale of the other eight rows", "scale_panel", "+ eight * (8 * kUnits)",
            "+ (eight ^ 1) * (8 * kUnits)", "digest"),
    planted("four scales where fewer are left", "scale_panel", "if (depth >= end_) return;", "",
            "out of bounds"),
    planted("codes past the last row", "code_ring", "row_of_w < n ? k - depth : 0", "k - depth",
            "out of bounds"),
    planted("x past the end of K", "code_ring", "from_ + i * between_ + depth, depth < end_",
            "from_ + i * between_ + depth, true", "out of bounds"),
    planted("columns past M", "code_ring", "if (tile * 8 < columns_of_lane_)", "if (true)",
            "in flight"),
    planted("x in the order of the mma's own k", "code_ring", "at.quarter * kLanePieces + i",
            "i * 4 + at.quarter", "digest"),
    planted("codes over the copies of the pairs", "pair_table", "kPairRow + kLaneCopies + i",
            "kPairRow + i", "in flight"),
    planted("nibbles the wrong way round", "pair_table", "(values[i / 16], values[i % 16])",
            "(values[i % 16], values[i / 16])", "digest"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(
        tmp_path_factory.mktemp("unchanged"), "run_linear_few_rows.cpp", "launch/linear_few_rows"
    )


@pytest.mark.slow
@each(MUTANTS)
def test_a_planted_fault_is_caught(mutant: Mutant, unchanged: Build, tmp_path: Path) -> None:
    assert_caught(mutant, unchanged, tmp_path)
