"""Faults planted in the CUDA-core product and in the LoRA branch's kernels (planted_faults.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from planted_faults import Build, Mutant, assert_caught, build, each, mutant

pytestmark = pytest.mark.slow

MUTANTS = [
    mutant("no barrier between a step's stores and its reads", "fma_tile",
           "next_right.store(memory.right, buffer);\n      sync_block();",
           "next_right.store(memory.right, buffer);", "linear_fma lora", "uninitialised"),
    mutant("one buffer", "fma_tile", "      buffer ^= 1;\n", "", "linear_fma lora", "race"),
    mutant("a row past the last", "fma_tile", "if (c >= columns) return quad;", "",
           "linear_fma lora", "out of bounds"),
    mutant("a view taken for aligned", "fma_tile", "if (aligned && d + kQuad <= end)",
           "if (d + kQuad <= end)", "linear_fma lora", "misaligned"),
    mutant("the depth's tail left out", "fma_tile",
           "d < end; d += kStepDepth", "d + kStepDepth <= end; d += kStepDepth",
           "linear_fma lora", "digest"),
    mutant("the mask at the transposed place", "lora_product",
           "dropout.row_key(kAlongDepth ? c : d)", "dropout.row_key(kAlongDepth ? d : c)",
           "lora", "digest"),
    mutant("the last run read past the depth", "lora_product",
           "begin + p.run_depth < p.depth ? begin + p.run_depth : p.depth",
           "begin + p.run_depth", "lora", "out of bounds"),
    mutant("the first run alone", "lora_sums", "run < p.runs", "run < 1", "lora", "digest"),
    mutant("no zeros behind the operand", "lora_sums", "part >= p.parts ? 0.0f", "false ? 0.0f",
           "lora", "digest"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("unchanged"), "run_qlora.cpp")


@each(MUTANTS)
def test_a_planted_fault_is_caught(mutant: Mutant, unchanged: Build, tmp_path: Path) -> None:
    assert_caught(mutant, unchanged, tmp_path)
