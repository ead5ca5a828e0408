"""The emulator (docs/emulation.md): its own tests, faults planted in kernels, what these move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emulated_build import EMULATION, KERNELS, compile_object, emulator_objects, link, run
from planted_faults import Build, Mutant, assert_caught, build, mutant
from qlora_native import ops

emulation = pytest.importorskip(
    "qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON"
)


SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover")


@pytest.mark.parametrize("flags", [(), SANITIZE], ids=["plain", "sanitized"])
def test_the_emulator_finds_what_it_must(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Its own tests; under AddressSanitizer, which takes the portable switch of fibres, too."""
    emulator = emulator_objects(tmp_path, *flags)
    for source in sorted(EMULATION.glob("test_emulator*.cpp")):
        test = compile_object(source, tmp_path / f"{source.stem}.o", KERNELS, *flags)
        assert "\n0 failures" in run(link([*emulator, test], tmp_path / source.stem, *flags))


# ---- faults planted in the kernels ---------------------------------------------------------------


QUANTIZE = "quantize_4bit"
MUTANTS = [
    mutant("no barrier after the bins", QUANTIZE, "    }\n    sync_block();\n  }\n", "    }\n  }\n",
           QUANTIZE, "uninitialised"),
    mutant("no barrier for the warps' maxima", "block_absmax", "    sync_block();\n", "",
           QUANTIZE, "uninitialised"),
    mutant("one set of maxima", "block_absmax", "turn * kTileWarps", "0 * turn",
           QUANTIZE, "race"),
    mutant("a barrier in a branch", "block_absmax", "    sync_block();\n",
           "    if (warp_index() > 0) sync_block();\n", QUANTIZE, "uninitialised"),
    mutant("a vector load of the tail", "tile", "if (aligned && at.whole_warp)", "if (aligned)",
           QUANTIZE, "out of bounds"),
    mutant("a view taken for aligned", "tile", "if (aligned && at", "if (at",
           QUANTIZE, "misaligned"),
    mutant("absmax by half a warp", "block_absmax", "step < lanes", "step < lanes / 2",
           QUANTIZE, "digest"),
    mutant("scale of the next block", "dequantize_4bit", "at.first >> p.log2_blocksize)",
           "(at.first >> p.log2_blocksize) + 1)", "dequantize_4bit", "out of bounds"),
    mutant("nibbles the wrong way round", "dequantize_4bit",
           "i % 2 == 0 ? 4 * i + 4 : 4 * i - 4", "4 * i", "dequantize_4bit", "digest"),
    mutant("the table without its barrier", "dequantize_4bit",
           "load_dynamic_map<true>(map);\n  sync_block();", "load_dynamic_map<true>(map);",
           "dequantize_4bit", "uninitialised"),
    mutant("a code table one word short", "codes_8bit", "i < CodeTable<kSigned>::kWords",
           "i < CodeTable<kSigned>::kWords - 1", "quantize_8bit", "uninitialised"),
    mutant("a limit not inverted", "tables", "if (negative) limit ^= Table::kLowMask;", "",
           "quantize_8bit", "digest"),
    mutant("halves the wrong way round", "tile", "octet.value[i] = odd ? got : even_half;",
           "octet.value[i] = odd ? even_half : got;", QUANTIZE, "digest"),
    mutant("the mean's tree without barriers", "mean", "    sync_block();\n", "",
           "quantize_8bit", "uninitialised"),
    mutant("the mean's tree with one barrier", "mean",
           "  for (int half = kMeanThreads / 2; half > 0; half /= 2) {\n    sync_block();\n",
           "  sync_block();\n  for (int half = kMeanThreads / 2; half > 0; half /= 2) {\n",
           "quantize_8bit", "race"),
    mutant("a warp leaves before its shuffles", "adamw_8bit",
           "if (!warp_has_values) continue;", "if (at.count == 0) continue;", "adamw", "divergent"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("unchanged"), "run_kernels.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_fault_is_caught(mutant: Mutant, unchanged: Build, tmp_path: Path) -> None:
    assert_caught(mutant, unchanged, tmp_path)


# ---- through the ops -----------------------------------------------------------------------------


@pytest.fixture
def emulated():
    emulation.use(True)
    yield
    emulation.count(False)
    emulation.set_seed(0)
    emulation.use(False)


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_the_order_of_threads_does_not_matter(emulated, blocksize: int) -> None:
    x = torch.randn(4096 * 9 + 33, generator=torch.Generator().manual_seed(0))
    results = []
    for seed in range(4):
        emulation.set_seed(seed)
        results.append(ops.quantize_4bit(x, blocksize))
    for packed, absmax in results[1:]:
        assert torch.equal(packed, results[0][0]) and torch.equal(absmax, results[0][1])


N = 64 * 4096
BF16 = torch.bfloat16


def _quantize(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    x = torch.randn(N, dtype=dtype)
    return lambda: ops.quantize_4bit(x, 64), dtype.itemsize + 0.5 + 4 / 64


def _dequantize(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    packed, absmax = ops.quantize_4bit(torch.randn(N), 64)
    return (
        lambda: ops.dequantize_4bit(packed, absmax, None, None, (N,), dtype=dtype),
        dtype.itemsize + 0.5 + 4 / 64,
    )


def _dequantize_double() -> tuple[Callable[[], object], float]:
    packed, absmax = ops.quantize_4bit(torch.randn(N), 64)
    scales = ops.quantize_scales(absmax)
    return (
        lambda: ops.dequantize_4bit(packed, *scales, (N,), dtype=BF16),
        2 + 0.5 + (1 + 4 / 256) / 64,
    )


HYPER = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "step": 1,
    "maximize": False,
}


def _adamw() -> tuple[Callable[[], object], float]:
    lists = [[torch.rand(N)] for _ in range(4)]
    return lambda: ops.adamw_step(*lists, **HYPER), 28


def _adamw_8bit() -> tuple[Callable[[], object], float]:
    codes = [torch.randint(256, (N,), dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.rand(N // 256) for _ in range(2)]
    lists = [[t] for t in (torch.randn(N), torch.randn(N), *codes, *absmax)]
    return lambda: ops.adamw_8bit_step(*lists, **HYPER), 16 + 16 / 256


# The least that has to cross the bus for a value, and what a kernel may ask for in whole sectors:
# 1.05 times that and, in two kernels, `cached` bytes a value more, mostly out of a cache.
# Double-quantized: a warp asks for sectors of one-byte scales, of nested absmax and of the offset.
# 8-bit AdamW: a warp has one absmax of each moment, and the 25.6 kB of tables that a block of
# threads sets up once are shared by 32,768 values here, by millions in a model.
@pytest.mark.parametrize(
    ("make", "cached", "conflicts"),
    [
        pytest.param(lambda: _quantize(torch.float32), 0, 0, id="quantize_4bit float32"),
        pytest.param(lambda: _quantize(BF16), 0, 0, id="quantize_4bit bfloat16"),
        pytest.param(lambda: _dequantize(torch.float32), 0, 0, id="dequantize_4bit float32"),
        pytest.param(lambda: _dequantize(BF16), 0, 0, id="dequantize_4bit bfloat16"),
        pytest.param(_dequantize_double, 0.3, None, id="dequantize_4bit double-quantized"),
        pytest.param(_adamw, 0, 0, id="adamw 32-bit"),
        pytest.param(_adamw_8bit, 0.5, None, id="adamw 8-bit"),
    ],
)
def test_kernels_move_little_more_than_they_must(
    emulated, make, cached: float, conflicts: int | None, capsys
) -> None:
    torch.manual_seed(0)
    op, least = make()
    emulation.count(True)
    op()
    counts = emulation.counts()
    moved = 32 * (counts["loaded_sectors"] + counts["stored_sectors"]) / N
    with capsys.disabled():
        print(f"  {moved:.3f} bytes a value, least {least:.3f}: {moved / least:.3f}; {counts}")
    assert moved <= 1.05 * least + cached
    if conflicts is not None:
        assert counts["bank_conflicts"] == conflicts
