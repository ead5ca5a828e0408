"""Faults planted in the products in tiles: linear_tiles.cuh, linear_wgmma.cuh and their parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from planted_faults import Build, Mutant, assert_caught, build, each, mutant

pytest.importorskip("qlora_native._emulation", reason="not a build with QLORA_EMULATION=ON")


def of_tiles(name: str, file: str, old: str, new: str, caught_by: str) -> Mutant:
    return mutant(name, file, old, new, "linear_tiles", caught_by)


def of_wgmma(name: str, file: str, old: str, new: str, caught_by: str) -> Mutant:
    return mutant(name, file, old, new, "linear_wgmma", caught_by)


KERNEL = "linear_tiles"
OF_TILES = [
    of_tiles("no barrier after the wait", KERNEL,
            "may be overwritten.\n    sync_block();\n", "may be overwritten.\n", "race"),
    of_tiles("waits for a group too few", KERNEL, "wait_copies<kTileStages - 2>",
            "wait_copies<kTileStages - 1>", "in flight"),
    of_tiles("LoRA's panels refilled before all have read them", KERNEL,
            "    sync_block();  // the panels have been read\n", "", "race"),
    of_tiles("the next weights over those that are read", KERNEL,
            "write_piece(scaled, 2 * i, step + 1)", "write_piece(scaled, 2 * i, step)", "race"),
    of_tiles("the mask on the base product too", KERNEL, "  store_tile(tile, p.out, row, column);",
            "  if (p.dropout.threshold > 0) apply_dropout(tile, p.dropout, row, column);\n"
            "  store_tile(tile, p.out, row, column);", "digest"),
    of_tiles("weights stored without the swizzle", "weight_tile",
            "panel + (panel_row(row) ^", "panel + (row * kPanelColumns ^", "digest"),
    of_tiles("scale of the row above", "weight_tile", "block = first >>",
            "block = (first >= weight.columns ? first - weight.columns : first) >>", "digest"),
    of_tiles("the depth's tail not masked", "panel",
            "column + own_column < from.columns ? from.rows - row : 0", "from.rows - row",
            "out of bounds"),
    of_tiles("rows past M stored", "tile_epilogue", "row >= out.rows || column >= out.columns",
            "column >= out.columns", "out of bounds"),
]  # fmt: skip

RING = "operand_ring"
CONSUMER = "warpgroup_tile"
OF_WGMMA = [
    of_wgmma("full without a fence of proxies", "linear_wgmma",
             "    fence_async_proxy();\n    arrive(", "    arrive(", "race"),
    of_wgmma("full before x has landed", "linear_wgmma", "    wait_copies<0>();\n", "",
             "in flight"),
    of_wgmma("mbarriers not fenced", "linear_wgmma", "      fence_async_proxy();\n    }", "    }",
             "race"),
    of_wgmma("the other phase of full", RING, "kFullBarrier + stage, turn)",
             "kFullBarrier + stage, turn ^ 1)", "divergent barrier"),
    of_wgmma("the other phase of empty", RING, "kEmptyBarrier + stage, turn ^ 1)",
             "kEmptyBarrier + stage, turn)", "divergent barrier"),
    of_wgmma("a stage given back while it is read", CONSUMER,
             "        wait_products<1>(sums);\n        give_back(ring, last_stage);\n",
             "        give_back(ring, last_stage);\n        wait_products<1>(sums);\n", "race"),
    of_wgmma("a wait for a group too few", CONSUMER, "wait_products<1>", "wait_products<2>",
             "race"),
    of_wgmma("sums used before the last wait", CONSUMER, "    wait_products<0>(sums);\n", "",
             "race"),
    of_wgmma("no fence of the sums", CONSUMER, "      fence_products();\n", "", "race"),
    of_wgmma("the gradient's panels not so far apart", CONSUMER, "kTileDepth * kPanelColumns",
             "8 * kPanelColumns", "digest"),
    of_wgmma("weights stored without the swizzle", "weight_producer", "panel_row(row)) ^",
             "row * kPanelColumns) ^", "digest"),
    of_wgmma("scales a step late", "weight_producer", "load_scales(step + 1)", "load_scales(step)",
             "digest"),
    of_wgmma("one scale for two blocks", "weight_producer",
             "kPanelColumns >> weight.log2_blocksize <= 1 &&", "", "digest"),
    of_wgmma("codes not waited for", "weight_producer",
             "    if (step % kStepsOfCodePanel == 0) codes_.wait(step);\n", "", "uninitialised"),
    of_wgmma("codes over those that are read", "linear_wgmma",
             "(step + 1) % kStepsOfCodePanel", "(step + 2) % kStepsOfCodePanel", "race"),
    of_wgmma("more codes than a row has", "code_panels", "rest < kCodePanel ? rest : kCodePanel",
             "kCodePanel", "out of bounds"),
    of_wgmma("bytes that nobody expects", "code_panels",
             "arrive_expecting(barriers_, barrier, bytes)",
             "arrive_expecting(barriers_, barrier, bytes / 2)", "divergent barrier"),
    of_wgmma("the mask on the base product too", "linear_wgmma", "  store_tile(tile, p.out,",
             "  if (p.dropout.threshold > 0) apply_dropout(tile, p.dropout, at.row, at.column);\n"
             "  store_tile(tile, p.out,", "digest"),
]  # fmt: skip


def unchanged(folder: pytest.TempPathFactory, kernel: str) -> Build:
    return build(folder.mktemp(kernel), f"run_{kernel}.cpp", "launch/linear_[tw]*")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return unchanged(tmp_path_factory, "linear_tiles")


@pytest.fixture(scope="module")
def wgmma(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return unchanged(tmp_path_factory, "linear_wgmma")


@pytest.mark.slow
@each(OF_TILES)
def test_a_fault_in_linear_tiles_is_caught(mutant: Mutant, tiles: Build, tmp_path: Path) -> None:
    assert_caught(mutant, tiles, tmp_path)


@pytest.mark.slow
@each(OF_WGMMA)
def test_a_fault_in_linear_wgmma_is_caught(mutant: Mutant, wgmma: Build, tmp_path: Path) -> None:
    assert_caught(mutant, wgmma, tmp_path)
