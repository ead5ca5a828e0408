"""torch optimizers whose whole step is one native call, with 32-bit or 8-bit blockwise state.

The paged ones' large state gives way where memory is short (docs/paging.md).
"""

from __future__ import annotations

from qlora_native.optim.adamw import AdamW, AdamW8bit
from qlora_native.optim.lion import Lion, Lion8bit
from qlora_native.optim.native import BLOCKSIZE
from qlora_native.optim.paged import (
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    PagedSGD,
    PagedSGD8bit,
)
from qlora_native.optim.sgd import SGD, SGD8bit

__all__ = [
    "BLOCKSIZE",
    "SGD",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedSGD",
    "PagedSGD8bit",
    "SGD8bit",
]
