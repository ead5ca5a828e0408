"""What ours is timed beside: bitsandbytes, by its wheel, and torch's own optimizers.

Kernels are compared, not Python: bitsandbytes' ops are called where its functions around them copy
a table from the host or wait for the device, which no graph can capture. Its outputs are fresh, as
in its users' hands; in a graph that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_acceptance.setting import Setting
from bench.gpu_acceptance.timing import Call

BITSANDBYTES = "bitsandbytes"
BLOCKSIZE, BLOCKSIZE_8BIT = 64, 256
# Torch has no Lion: its AdamW stands there for what a step costs otherwise.
TORCH_FUSED = {"AdamW": "AdamW", "Lion": "AdamW", "SGD": "SGD"}


def bitsandbytes_is_here(setting: Setting) -> bool:
    return (setting.folder / "peer" / BITSANDBYTES).exists()


def quantize_4bit(x: Tensor) -> Sequence[Call]:
    import bitsandbytes  # noqa: F401, its ops

    op = torch.ops.bitsandbytes.quantize_4bit.default
    return [lambda: op(x, BLOCKSIZE, "nf4", torch.uint8)]


def dequantize_4bit(x: Tensor) -> Sequence[Call]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(x, blocksize=BLOCKSIZE, quant_type="nf4")
    return [lambda: bnb.dequantize_4bit(packed, state)]


def quantize_blockwise(x: Tensor) -> Sequence[Call]:
    import bitsandbytes.functional as bnb

    code = bnb.create_dynamic_map().to(x.device)
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    return [lambda: op(x, code, BLOCKSIZE_8BIT)]


def dequantize_blockwise(x: Tensor) -> Sequence[Call]:
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_blockwise(x, blocksize=BLOCKSIZE_8BIT)
    return [lambda: bnb.dequantize_blockwise(codes, state)]


class Weights:
    """One weight as bitsandbytes keeps it for QLoRA: NF4, its scales quantized again."""

    def __init__(self, dense: Tensor, copies: int) -> None:
        import bitsandbytes.functional as bnb

        packed, self.state = bnb.quantize_4bit(
            dense, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
        )
        self.copies = [packed.clone() for _ in range(copies)]


def linear(dense: Tensor, copies: int, x: Tensor) -> Sequence[Call]:
    from bitsandbytes import matmul_4bit

    weights = Weights(dense, copies)
    return [lambda w=w: matmul_4bit(x, w.t(), weights.state) for w in weights.copies]


def input_gradient(dense: Tensor, copies: int, grad: Tensor) -> Sequence[Call]:
    """What its matmul_4bit does backwards."""
    import bitsandbytes.functional as bnb

    weights = Weights(dense, copies)
    return [
        lambda w=w: torch.matmul(grad, bnb.dequantize_4bit(w, weights.state))
        for w in weights.copies
    ]


@dataclass(frozen=True)
class Adapter:
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scaling: float


def lora(dense: Tensor, copies: int, x: Tensor, grad: Tensor, adapter: Adapter) -> Sequence[Call]:
    """A layer as peft makes it: torch's linears beside matmul_4bit, fp32 adapters under autocast.

    Forward, then autograd's gradients for x, A and B.
    """
    from bitsandbytes import matmul_4bit

    weights = Weights(dense, copies)
    leaves = [part.detach().clone().requires_grad_() for part in (x, adapter.a, adapter.b)]

    def call(w: Tensor) -> tuple[Tensor, ...]:
        x, a, b = leaves
        out = matmul_4bit(x, w.t(), weights.state)
        inner = torch.nn.functional.linear(x, a.to(x.dtype))
        out = out + torch.nn.functional.linear(inner, b.to(x.dtype)) * adapter.scaling
        return torch.autograd.grad(out, leaves, grad)

    return [lambda w=w: call(w) for w in weights.copies]


def _parameter(n: int, device: torch.device) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.rand(n, device=device))
    p.grad = torch.rand_like(p)
    return p


def bitsandbytes_step(rule: str, bits: int, n: int, device: torch.device) -> Sequence[Call]:
    """rule: "AdamW", "Lion" or "SGD" (with momentum), of n values; bits of its state."""
    import bitsandbytes

    p = _parameter(n, device)
    more = {"momentum": 0.9} if rule == "SGD" else {}
    make: Any = getattr(bitsandbytes.optim, rule if bits == 32 else f"{rule}8bit")
    optimizer = make([p], lr=1e-3, **more)
    optimizer.step()  # makes the state, and would wait for the device each time
    group = optimizer.param_groups[0]
    return [lambda: optimizer.update_step(group, p, 0, 0)]


def torch_step(rule: str, n: int, device: torch.device) -> Sequence[Call]:
    """Of TORCH_FUSED's rule, with 32-bit state, in one kernel."""
    p = _parameter(n, device)
    optimizer: torch.optim.Optimizer
    if TORCH_FUSED[rule] == "SGD":
        optimizer = torch.optim.SGD([p], lr=1e-3, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.AdamW([p], lr=1e-3, fused=True, capturable=device.type == "cuda")
    optimizer.step()
    return [optimizer.step]
