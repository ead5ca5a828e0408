"""The paged optimizers: each is its plain one, whose large state gives way (Dettmers et al., 2023).

"QLoRA: Efficient Finetuning of Quantized LLMs", section 3. Same arguments, and those of PagedState
by name; same kernels, and so the same bits.
"""

from __future__ import annotations

from qlora_native.optim.adamw import AdamW, AdamW8bit
from qlora_native.optim.lion import Lion, Lion8bit
from qlora_native.optim.paged_state import PagedState
from qlora_native.optim.sgd import SGD, SGD8bit


class PagedAdamW(PagedState, AdamW):
    """AdamW with paged 32-bit state."""


class PagedAdamW8bit(PagedState, AdamW8bit):
    """AdamW8bit with paged state."""


class PagedLion(PagedState, Lion):
    """Lion with paged 32-bit state."""


class PagedLion8bit(PagedState, Lion8bit):
    """Lion8bit with paged state."""


class PagedSGD(PagedState, SGD):
    """SGD with momentum and paged 32-bit state."""


class PagedSGD8bit(PagedState, SGD8bit):
    """SGD8bit with paged state."""
