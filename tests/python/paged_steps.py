"""Steps by drawn gradients, and a digest after each; as a program, one for each line of its input.

python paged_steps.py DIRECTORY SEED
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlora_native import optim
from qlora_native.optim.native import NativeOptimizer


def paged(params: list[nn.Parameter], directory: str) -> NativeOptimizer:
    """With nothing that stays."""
    settings: dict[str, Any] = {"device_budget": 0, "chunk_bytes": 1 << 17}
    return optim.PagedAdamW8bit(params, paging_directory=directory, **settings)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(n)) for n in (100_000, 250_001)]


def digests(optimizer: NativeOptimizer, params: list[nn.Parameter], seed: int) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        whole = hashlib.sha256()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        for p in params:
            whole.update(p.detach().numpy().tobytes())
        yield whole.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = parameters()
    for _, digest in zip(sys.stdin, digests(paged(own, sys.argv[1]), own, int(sys.argv[2]))):  # noqa: B905 - one is endless
        print(digest, flush=True)
