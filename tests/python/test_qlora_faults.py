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
    mutant("no barrier at a step", "lora_tensor",
           "      sync_block();  // the step is there", "      // the step is there",
           "lora_tensor", "uninitialised"),
    mutant("a step read before its copies are there", "lora_tensor",
           "wait_copies<kLoraTensorStages - 2>", "wait_copies<kLoraTensorStages - 1>",
           "lora_tensor", "in flight"),
    mutant("the copies of a step into the tile in use", "lora_tensor",
           "return step % kLoraTensorStages * kLoraLeftTile",
           "return step % (kLoraTensorStages - 1) * kLoraLeftTile", "lora_tensor", "in flight"),
    mutant("the next small operand over the one that is read", "lora_tensor",
           "next.store(right_, (step + 1) % 2)", "next.store(right_, step % 2)",
           "lora_tensor", "race"),
    mutant("keys of the step before", "lora_tensor",
           "make_keys_of_step(depth(step + 1), (step + 1) % 2)",
           "make_keys_of_step(depth(step), (step + 1) % 2)", "lora_tensor", "digest"),
    mutant("the low part left out", "lora_tensor",
           "truncate_tf32(pair.value[v] - high.value[v])", "0.0f", "lora_tensor", "digest"),
    mutant("neighbours of the depth changed about", "lora_tensor",
           "a.value[i % 2 + 2] = widen(T{static_cast<std::uint16_t>(m.word[i] >> 16)});",
           "a.value[i % 2 + 2] = a.value[i % 2];\n"
           "    a.value[i % 2] = widen(T{static_cast<std::uint16_t>(m.word[i] >> 16)});",
           "lora_tensor", "digest"),
    mutant("rows past the last stored", "lora_tensor",
           "        if (row < job_.rows) {\n", "        {\n", "lora_tensor", "out of bounds"),
    mutant("the second job with the first's blocks", "lora_tensor",
           "is_first ? block_index() : block_index() - p.first_blocks", "block_index()",
           "lora_tensor", "out of bounds"),
    mutant("sums of dy from each tile of columns", "lora_tensor",
           "row < job_.rows && col_ == 0 && lane_index() % 4 == 0",
           "row < job_.rows && lane_index() % 4 == 0", "lora_tensor", "race"),
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
