"""The 4-bit linear layer: forward, input gradient, and with LoRA forward + backward.

Beside bitsandbytes (NF4, double-quantized, its layer and its autograd) and un-quantized torch in
the same dtype; for 16-bit activations also torch with fp32 weights and the activations cast, the
honest way where a processor has no such instructions. bitsandbytes 0.50.2 packs a layer anew in its
first pass without gradient and has no input gradient from then on: a layer that is trained here has
never seen such a pass.

The least that is moved: the codes, one byte of scale per 64 of them, x and the result. The LoRA
rows also time the base products alone (forward + input gradient without the branch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import OURS, Case, Contenders, main
from bench.peers import peer
from bench.shapes import SMOLLM2_135M, SQUARE_4096
from qlora_native import ops
from qlora_native.nn import Linear4bit, QLoRALinear

TITLE = "4-bit linear"
BLOCKSIZE = 64
RANK = 16
BASE_ALONE = f"{OURS}, base alone"


def _random(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def _linear(shape: tuple[int, int], dtype: torch.dtype) -> torch.nn.Linear:
    """Frozen, un-quantized."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    layer.weight = torch.nn.Parameter(_random(shape, dtype, 0), requires_grad=False)
    return layer


def _bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> torch.nn.Module | None:
    bnb = peer("bitsandbytes")
    if bnb is None:
        return None
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=dtype, compress_statistics=True,
        quant_type="nf4",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        _random(shape, dtype, 0), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return layer.to("cpu")


def _without_grad(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def _forward(shape: tuple[int, int], m: int, dtype: torch.dtype) -> Contenders:
    dense = _linear(shape, dtype)
    x = _random((m, shape[1]), dtype, 1)
    contenders: Contenders = {
        OURS: _without_grad(Linear4bit.from_linear(dense, blocksize=BLOCKSIZE), x),
        "torch": _without_grad(dense, x),
    }
    if dtype != torch.float32:
        wide = dense.weight.float()
        contenders["torch, fp32 weights"] = lambda: (x.float() @ wide.T).to(dtype)
    if layer := _bitsandbytes(shape, dtype):
        contenders["bitsandbytes"] = _without_grad(layer, x)
    return contenders


def _input_gradient(shape: tuple[int, int], m: int, dtype: torch.dtype) -> Contenders:
    dense = _linear(shape, dtype)
    layer = Linear4bit.from_linear(dense, blocksize=BLOCKSIZE)
    grad_out = _random((m, shape[0]), dtype, 2)
    state = layer.quant_state
    scales = (state.absmax, state.nested_absmax, state.nested_offset)
    contenders: Contenders = {
        OURS: lambda: ops.linear_4bit_backward_input(
            grad_out, layer.weight, *scales, shape[1], BLOCKSIZE, "nf4"
        ),
        "torch": lambda: grad_out @ dense.weight,
    }
    if dtype != torch.float32:
        wide = dense.weight.float()
        contenders["torch, fp32 weights"] = lambda: (grad_out.float() @ wide).to(dtype)
    if theirs := _bitsandbytes(shape, dtype):
        x = _random((m, shape[1]), dtype, 1).requires_grad_()
        y = theirs(x)
        contenders["bitsandbytes"] = lambda: torch.autograd.grad(y, x, grad_out, retain_graph=True)
    return contenders


class _Lora(torch.nn.Module):
    """LoRA around any frozen layer, op by op, with fp32 adapters: what peft computes."""

    def __init__(self, base: torch.nn.Module, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(_random((RANK, shape[1]), torch.float32, 3))
        self.b = torch.nn.Parameter(_random((shape[0], RANK), torch.float32, 4))

    def forward(self, x: Tensor) -> Tensor:
        branch = (x.to(self.a.dtype) @ self.a.T) @ self.b.T * 2.0
        return self.base(x) + branch.to(x.dtype)


def _lora(shape: tuple[int, int], m: int, dtype: torch.dtype) -> Contenders:
    dense = _linear(shape, dtype)
    grad_out = _random((m, shape[0]), dtype, 2)
    x = _random((m, shape[1]), dtype, 1).requires_grad_()

    def step(layer: torch.nn.Module) -> Callable[[], object]:
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), inputs, grad_out)

    base = Linear4bit.from_linear(dense, blocksize=BLOCKSIZE)
    contenders: Contenders = {
        OURS: step(QLoRALinear.from_base(base, r=RANK, alpha=2 * RANK)),
        BASE_ALONE: step(base),
        "torch": step(_Lora(dense, shape)),
    }
    if theirs := _bitsandbytes(shape, dtype):
        contenders["bitsandbytes"] = step(_Lora(theirs, shape))
    return contenders


def _cases_of(
    shape: tuple[int, int], label: str, m: int, dtype: torch.dtype, training: bool
) -> Iterator[Case]:
    n, k = shape
    weight = n * k // 2 + n * k // BLOCKSIZE
    short = str(dtype).removeprefix("torch.")
    bf16 = dtype == torch.bfloat16
    flops = 2 * m * n * k
    x_bytes, y_bytes = m * k * dtype.itemsize, m * n * dtype.itemsize
    name = f"{label}, M={m}, {short}"
    yield Case(
        f"forward {name}",
        lambda: _forward(shape, m, dtype),
        read=weight + x_bytes, write=y_bytes, flops=flops, bf16=bf16,
    )  # fmt: skip
    if not training:
        return
    yield Case(
        f"input gradient {name}",
        lambda: _input_gradient(shape, m, dtype),
        read=weight + y_bytes, write=x_bytes, flops=flops, bf16=bf16,
    )  # fmt: skip
    yield Case(
        f"LoRA r={RANK} forward + backward {name}",
        lambda: _lora(shape, m, dtype),
        read=2 * weight + 2 * (x_bytes + y_bytes), write=x_bytes + y_bytes, flops=2 * flops,
        bf16=bf16,
    )  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        for dtype in (torch.float32, torch.bfloat16):
            yield from _cases_of((48, 64), "48 × 64", 6, dtype, training=True)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 4, 16, 64, 512):
            yield from _cases_of(SQUARE_4096, "4096 × 4096", m, dtype, training=m == 512)
        up = SMOLLM2_135M.linears["up_proj"]
        yield from _cases_of(up, f"{SMOLLM2_135M.name} up_proj", 1024, dtype, training=True)


if __name__ == "__main__":
    main(TITLE, cases)
