"""The emulator (docs/emulation.md): its own tests, faults planted in kernels, what these move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench import cuda_counts
from bench.cuda_cases import CASES, Case
from bench.cuda_counts import Counts

from emulated_build import EMULATION, KERNELS, compile_object, emulator_objects, link, run
from planted_faults import Build, Mutant, assert_caught, build, each, mutant
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
    mutant("a warp leaves before its shuffles", "step_8bit",
           "if (!warp_has_values) continue;", "if (at.count == 0) continue;", "step", "divergent"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("unchanged"), "run_kernels.cpp")


@pytest.mark.slow
@each(MUTANTS)
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


@pytest.fixture(scope="module")
def counted() -> list[tuple[Case, Counts]]:
    return [(case, cuda_counts.count(case)) for case in CASES]


@pytest.mark.parametrize("i", range(len(CASES)), ids=[case.name for case in CASES])
def test_kernels_move_little_more_than_they_must(
    counted: list[tuple[Case, Counts]], i: int
) -> None:
    """Within the case's bars; and where it misses those of all, the document says why."""
    case, counts = counted[i]
    assert cuda_counts.moved_bytes(counts) <= case.most_bytes, counts
    if case.conflicts is not None:
        assert counts["bank_conflicts"] <= case.conflicts
    assert case.why or not cuda_counts.misses(case, counts)


def test_the_document_of_counts_is_up_to_date(counted: list[tuple[Case, Counts]]) -> None:
    assert cuda_counts.DOCUMENT.read_text() == cuda_counts.render(counted)
