"""bitsandbytes.optim over our steps: Adam, AdamW, Lion and SGD with momentum."""

from __future__ import annotations

from qlora_native.bitsandbytes._missing import missing_class
from qlora_native.bitsandbytes.optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
)
from qlora_native.bitsandbytes.optim.adamw import (
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from qlora_native.bitsandbytes.optim.lion import (
    Lion,
    Lion8bit,
    Lion32bit,
    PagedLion,
    PagedLion8bit,
    PagedLion32bit,
)
from qlora_native.bitsandbytes.optim.manager import GlobalOptimManager
from qlora_native.bitsandbytes.optim.sgd import SGD, SGD8bit, SGD32bit

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "SGD8bit",
    "SGD32bit",
]

_ELSE = "the rules are Adam, AdamW, Lion and SGD with momentum"

# Rules without kernels here: libraries import their names whether or not they are used.
for _rule in ("AdEMAMix", "Adagrad", "LAMB", "LARS", "PagedAdEMAMix", "RMSprop"):
    for _name in (_rule, f"{_rule}8bit", f"{_rule}32bit"):
        globals()[_name] = missing_class(_name, __name__, _ELSE)
PytorchLARS = missing_class("PytorchLARS", __name__, _ELSE)
