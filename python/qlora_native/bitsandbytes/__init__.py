"""The part of bitsandbytes' Python API that QLoRA programs use, over our ops.

`import qlora_native.bitsandbytes as bnb` uses it by its own name; after
`qlora_native.install_as_bitsandbytes()` every `import bitsandbytes` in the process gives it.
Names, arguments, files and numbers are those of bitsandbytes 0.50.2; what is not here raises an
error that names it (docs/integrations.md).
"""

from __future__ import annotations

import torch

from qlora_native.bitsandbytes import functional as functional
from qlora_native.bitsandbytes import nn as nn
from qlora_native.bitsandbytes import optim as optim
from qlora_native.bitsandbytes import utils as utils
from qlora_native.bitsandbytes._missing import attributes
from qlora_native.bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from qlora_native.bitsandbytes.nn import modules as modules
from qlora_native.bitsandbytes.optim import adam as adam

__all__ = ["MatmulLtState", "functional", "matmul", "matmul_4bit", "nn", "optim", "utils"]

# bitsandbytes' version whose API this is; the local part tells programs' logs which one it was.
__version__ = "0.50.2+qlora.native"

# What transformers, diffusers and accelerate ask whether a CPU will do.
features = {"multi_backend"}
supported_torch_devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())

__getattr__ = attributes(
    __name__, {"research": "it was experimental", "cextension": "our library is qlora_native._core"}
)
