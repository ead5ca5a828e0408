"""bench.gpu_model against times computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.cuda_cases import Case
from bench.gpu_model import CARDS, Card, predict

# 1 kB, 10 products' flops (of 4096), 4 x 2 slots and 2 passes a second.
CARD = Card("by hand", 1000.0, 40960.0, multiprocessors=2, clock=1.0, source="none")
CASE = Case("kernel", "by hand", lambda: int, least=960.0, multiply_adds=64.0)
COUNTS = {
    "loaded_sectors": 20,
    "stored_sectors": 11,
    "global_instructions": 2,
    "shared_instructions": 1,
    "shared_passes": 1,
    "tensor_flops": 4096,
}


@pytest.mark.parametrize(
    ("more", "limiter", "seconds", "of_limit"),
    [
        # 31 sectors are 992 bytes. Slots: 2 + 1 + 1 product + 64/32 of multiply-adds = 6 of 8.
        ({}, "memory", 0.992, 960 / 992),
        ({"shared_passes": 4}, "shared memory", 2.0, 0.96 / 2),
        ({"shared_instructions": 11}, "issue slots", 2.0, 0.96 / 2),
        ({"tensor_flops": 81920}, "issue slots", 25 / 8, 2 / (25 / 8)),
    ],
)
def test_by_hand(more: dict[str, int], limiter: str, seconds: float, of_limit: float) -> None:
    prediction = predict(CASE, {**COUNTS, **more}, CARD)
    assert prediction.limiter == limiter
    assert prediction.seconds == pytest.approx(seconds)
    assert prediction.of_limit == pytest.approx(of_limit)


def test_what_caches_hold_costs_no_bandwidth() -> None:
    assert predict(replace(CASE, cached=32.0), COUNTS, CARD).seconds == pytest.approx(0.96)


def test_every_card_has_a_source() -> None:
    assert all(card.source for card in CARDS)
