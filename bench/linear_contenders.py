"""Who does the work of a frozen 4-bit linear layer: forward, input gradient, and all of a step.

Outputs are fresh for all contenders. For 16-bit activations there is also torch with fp32 weights
and the activations cast, the honest way where a processor has no instructions for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import linear_layers as layers
from bench.case import COMPILED, OURS, Call, Contenders
from bench.data import matrix
from bench.linear_layers import BLOCKSIZE, Layer, Problem
from bench.peers import installed
from qlora_native import ops
from qlora_native.nn import QLoRALinear

RANK = 16
BASE_ALONE = f"{OURS}, base alone"
WIDE = "torch, fp32 weights"
TORCHAO_NF4 = f"torchao NF4{COMPILED}"


def _without_grad(layer: Layer, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def forward(p: Problem, compiled: bool) -> Contenders:
    def torch_mm() -> Call:
        """The weight lies as torch.mm wants it, [K, N]."""
        x, weight = p.x, p.weight.T.contiguous()
        return lambda: torch.mm(x, weight)

    def wide() -> Call:
        x, weight = p.x, p.weight.float()
        return lambda: (x.float() @ weight.T).to(p.dtype)

    contenders: Contenders = {
        OURS: lambda: _without_grad(layers.ours(p), p.x),
        "torch": lambda: _without_grad(layers.unquantized(p), p.x),
    }
    if p.dtype != torch.float16:  # a hundred times slower than its linear: 104 ms at M = 1, 4096²
        contenders["torch.mm"] = torch_mm
    if p.dtype != torch.float32:
        contenders[WIDE] = wide
    if installed("bitsandbytes"):
        contenders["bitsandbytes"] = lambda: _without_grad(layers.bitsandbytes(p), p.x)
    if installed("torchao"):
        if p.dtype == torch.bfloat16 and p.k % BLOCKSIZE == 0:
            contenders["torchao int4"] = lambda: _without_grad(layers.torchao_int4(p), p.x)
        if compiled:
            contenders[TORCHAO_NF4] = lambda: _without_grad(layers.torchao_nf4(p), p.x)
    return contenders


def input_gradient(p: Problem) -> Contenders:
    def ours() -> Call:
        layer, grad_out = layers.ours(p), p.grad_out
        state = layer.quant_state
        scales = (state.absmax, state.nested_absmax, state.nested_offset)
        return lambda: ops.linear_4bit_backward_input(
            grad_out, layer.weight, *scales, p.k, BLOCKSIZE, "nf4"
        )

    def torch_mm() -> Call:
        grad_out, weight = p.grad_out, p.weight
        return lambda: torch.mm(grad_out, weight)

    def wide() -> Call:
        grad_out, weight = p.grad_out, p.weight.float()
        return lambda: (grad_out.float() @ weight).to(p.dtype)

    def bitsandbytes() -> Call:
        x, grad_out = p.x.clone().requires_grad_(), p.grad_out
        y = layers.bitsandbytes(p)(x)
        return lambda: torch.autograd.grad(y, x, grad_out, retain_graph=True)

    contenders: Contenders = {OURS: ours, "torch.mm": torch_mm}
    if p.dtype != torch.float32:
        contenders[WIDE] = wide
    if installed("bitsandbytes"):
        contenders["bitsandbytes"] = bitsandbytes
    return contenders


class _Lora(torch.nn.Module):
    """LoRA around any frozen layer, op by op, with fp32 adapters: what peft computes."""

    def __init__(self, base: Layer, p: Problem) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(matrix((RANK, p.k), torch.float32, 3).clone())
        self.b = torch.nn.Parameter(matrix((p.n, RANK), torch.float32, 4).clone())

    def forward(self, x: Tensor) -> Tensor:
        branch = (x.to(self.a.dtype) @ self.a.T) @ self.b.T * 2.0
        return self.base(x) + branch.to(x.dtype)


def lora(p: Problem, compiled: bool) -> Contenders:
    """Forward and backward with the gradients of x and of the adapters."""

    def step(make: Callable[[], torch.nn.Module]) -> Callable[[], Call]:
        def maker() -> Call:
            layer, grad_out = make(), p.grad_out
            x = p.x.clone().requires_grad_()
            inputs = [x, *(q for q in layer.parameters() if q.requires_grad)]
            return lambda: torch.autograd.grad(layer(x), inputs, grad_out)

        return maker

    contenders: Contenders = {
        OURS: step(lambda: QLoRALinear.from_base(layers.ours(p), r=RANK, alpha=2 * RANK)),
        BASE_ALONE: step(lambda: layers.ours(p)),
        "torch": step(lambda: _Lora(layers.unquantized(p), p)),
    }
    if installed("bitsandbytes"):
        contenders["bitsandbytes"] = step(lambda: _Lora(layers.bitsandbytes(p), p))
    if compiled and installed("torchao"):
        contenders[TORCHAO_NF4] = step(lambda: _Lora(layers.torchao_nf4(p), p))
    return contenders
