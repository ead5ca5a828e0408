"""The time that a kernel's counts allow for on a card, and what limits it. A prediction, no timing.

Each resource has its work and its rate; the one that takes longest is the limiter. A kernel that
overlaps all of them perfectly takes that long; latency, launches and tails come on top and are not
modelled. Arithmetic on integers and addresses is not counted by the emulator, so issue slots are
those of accesses, tensor products and multiply-adds alone: a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.cuda_cases import Case

WARP = 32
FLOPS_OF_AN_MMA = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Card:
    """Published rates: dense bf16 products with fp32 sums, and the boost clock."""

    name: str
    bytes_per_second: float
    tensor_flops: float
    multiprocessors: int
    clock: float
    source: str
    architecture: int = 80

    def runs(self, case: Case) -> bool:
        """Hopper's warpgroup products are Hopper's alone; all else runs on what comes after."""
        return case.architecture in (80, self.architecture)

    @property
    def slots(self) -> float:
        """Warp instructions a second: four schedulers a multiprocessor."""
        return 4 * self.multiprocessors * self.clock

    @property
    def passes(self) -> float:
        """128 bytes of shared memory a clock and multiprocessor."""
        return self.multiprocessors * self.clock


CARDS = (
    Card("A100 80 GB SXM", 2.039e12, 312e12, 108, 1.410e9, "NVIDIA A100 data sheet"),
    Card("H100 SXM", 3.35e12, 989.4e12, 132, 1.830e9, "NVIDIA H100 data sheet and white paper", 90),
    Card("H200 SXM", 4.8e12, 989.4e12, 132, 1.830e9, "NVIDIA H200 data sheet", 90),
    Card("RTX 4090", 1.008e12, 165.2e12, 128, 2.520e9, "NVIDIA Ada architecture white paper", 89),
)


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limiter: str
    of_limit: float  # of memory's rate on the least bytes, or of the tensor cores' on the flops


def predict(case: Case, counts: Mapping[str, int], card: Card) -> Prediction:
    """Bytes come once out of memory: the least, and what sectors add but for what caches hold."""
    sectors = 32 * (counts["loaded_sectors"] + counts["stored_sectors"])
    moved = max(case.least, sectors - case.cached)
    products = counts["tensor_flops"] / FLOPS_OF_AN_MMA
    slots = (
        counts["global_instructions"]
        + counts["shared_instructions"]
        + products
        + case.multiply_adds / WARP
    )
    takes = {
        "memory": moved / card.bytes_per_second,
        "tensor cores": counts["tensor_flops"] / card.tensor_flops,
        "issue slots": slots / card.slots,
        "shared memory": counts["shared_passes"] / card.passes,
    }
    limiter = max(takes, key=lambda resource: takes[resource])
    least = max(case.least / card.bytes_per_second, takes["tensor cores"])
    return Prediction(takes[limiter], limiter, least / takes[limiter])
