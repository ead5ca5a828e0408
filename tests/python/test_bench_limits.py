"""The limit model: which level's bandwidth holds for which bytes."""

from __future__ import annotations

import pytest
import torch
from bench.case import Case
from bench.limit_model import least_seconds, working_sets
from bench.limits import ANY, READ, WRITE, Limits

MB, GB = 10**6, 10**9


def level(size: float, read: float, write: float, write_nt: float) -> dict[str, float]:
    rates = {"read": read * GB, "write": write * GB, "copy": read * GB, "write_nt": write_nt * GB}
    return {"bytes_per_thread": size * MB, **rates}


@pytest.fixture
def limits() -> Limits:
    """Two threads, a shared cache of 32 MB, and memory that writes past the caches fastest."""
    return Limits(
        threads=2,
        flops={"avx2": 200.0 * GB, "avx512": 200.0 * GB, "avx512bf16": 400.0 * GB},
        bandwidth={
            "L2": level(0.5, 400, 300, 30),
            "L3": level(8, 200, 200, 30),
            "memory": level(128, 40, 20, 50),
        },
    )


def case(dtype: torch.dtype = torch.float32, **work: int) -> Case:
    return Case("op", "shape", dtype, {}, **work)


def test_flops(limits: Limits) -> None:
    work = {"read": 1, "flops": 400 * GB}
    assert least_seconds(case(**work), limits, "avx2") == pytest.approx(2.0)
    assert least_seconds(case(torch.bfloat16, **work), limits, "avx512bf16") == pytest.approx(1.0)
    # The instructions for bf16 are of no use to other dtypes.
    assert least_seconds(case(torch.float16, **work), limits, "avx512bf16") == pytest.approx(2.0)


@pytest.mark.parametrize(("size", "rate"), [(0.1, 400), (1, 400), (16, 200), (256, 40), (999, 40)])
def test_rate_at_and_past_what_was_measured(limits: Limits, size: float, rate: float) -> None:
    assert limits.rate(READ, int(size * MB)) == pytest.approx(rate * GB)


def test_rate_between(limits: Limits) -> None:
    """64 MB lie half way from 16 to 256, on a logarithmic scale."""
    assert limits.rate(READ, 64 * MB) == pytest.approx((200 * 40) ** 0.5 * GB)
    rates = [limits.rate(ANY, size * MB) for size in (16, 24, 48, 64, 128, 256)]
    assert rates == sorted(rates, reverse=True)


def test_rate_takes_the_best_kind(limits: Limits) -> None:
    assert limits.rate(WRITE, 256 * MB) == pytest.approx(50 * GB)
    assert limits.rate(WRITE, 1 * MB) == pytest.approx(300 * GB)


def test_reading_and_writing_each_have_their_own_rate(limits: Limits) -> None:
    assert least_seconds(case(read=400 * MB), limits, "avx2") == pytest.approx(0.4 / 40)
    assert least_seconds(case(write=400 * MB), limits, "avx2") == pytest.approx(0.4 / 50)


def test_the_smaller_side_may_stay_in_a_cache(limits: Limits) -> None:
    """16 MB of codes are read from the cache while 256 MB of values pass by it."""
    seconds = least_seconds(case(read=16 * MB, write=256 * MB), limits, "avx2")
    assert seconds == pytest.approx(0.256 / 50)


def test_in_place_counts_a_byte_once_in_the_working_set(limits: Limits) -> None:
    """16 MB that are read and written back fit into the cache."""
    work = {"read": 16 * MB, "write": 16 * MB}
    in_place = Case("op", "shape", torch.float32, {}, in_place=True, **work)
    assert least_seconds(in_place, limits, "avx2") == pytest.approx(0.032 / 200)
    assert least_seconds(case(**work), limits, "avx2") < 0.032 / 40


def test_working_sets_are_those_that_decide(limits: Limits) -> None:
    moved = {"read": 256 * MB, "write": 16 * MB}
    assert working_sets(case(**moved), limits, ["avx2"]) == [16 * MB, 256 * MB, 272 * MB]
    in_place = Case("op", "shape", torch.float32, {}, in_place=True, **moved)
    assert working_sets(in_place, limits, ["avx2"]) == [256 * MB]
    assert working_sets(case(**moved, flops=40 * GB), limits, ["avx2"]) == []


def test_as_seen_by_probes(limits: Limits) -> None:
    """What was probed is the probes' best; the rest stays."""
    probes = [Limits(2, {}, {"memory": level(128, *rates)}) for rates in ((10, 9, 8), (12, 7, 8))]
    then = limits.as_seen_by(*probes)
    assert then.rate(READ, 256 * MB) == pytest.approx(12 * GB)
    assert then.rate(WRITE, 256 * MB) == pytest.approx(9 * GB)
    assert then.rate(READ, 1 * MB) == pytest.approx(400 * GB)
    assert limits.rate(READ, 256 * MB) == pytest.approx(40 * GB)
    assert probes[0].bandwidth["memory"]["read"] == 10 * GB


def test_raise_to_keeps_the_best(limits: Limits) -> None:
    other = Limits(2, {**limits.flops, "avx2": 250.0 * GB}, {"memory": level(128, 60, 10, 10)})
    limits.raise_to(other)
    assert limits.flops["avx2"] == 250 * GB
    assert limits.rate(READ, 256 * MB) == pytest.approx(60 * GB)
    assert limits.rate(WRITE, 256 * MB) == pytest.approx(50 * GB)
