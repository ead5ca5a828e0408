"""Stage: ours beside the peers; each row with its fraction of what was measured on this device.

A row that fails has its error in place of its seconds, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.every_op import HYPER
from bench.gpu_acceptance.setting import Setting
from bench.gpu_acceptance.timing import Call, copies, seconds

BF16 = torch.bfloat16
OURS = "ours"
# What a call needs at least: bytes over the bus, floating-point operations.
Least = tuple[float, float]
Row = tuple[str, Least, dict[str, Callable[[], Sequence[Call]]]]


def limits(device: torch.device, emulate: bool) -> dict[str, float]:
    """Bytes a second of a copy, read and written counted; FLOP/s of torch's bf16 product."""
    size, side = (1 << 20, 128) if emulate else (1 << 30, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(BF16) for _ in range(2))
    return {
        "bytes_per_second": 2 * size / seconds([lambda: target.copy_(source)], device),
        "flops": 2 * side**3 / seconds([lambda: torch.mm(a, b)] * 4, device),
    }


class Weights:
    """The same matrix as often as it takes to pass the caches: 4-bit, in bf16, and the peer's."""

    def __init__(self, n: int, k: int, setting: Setting) -> None:
        from qlora_native import ops

        self.n, self.k = n, k
        self.dense = torch.randn(n, k, device=setting.device).mul_(0.05).to(BF16)
        packed, absmax = ops.quantize_4bit(self.dense)
        self.parts = (packed, *ops.quantize_scales(absmax))
        self.count = copies(n * k // 2, setting.emulate)

    def quantized(self) -> list[tuple[Tensor, ...]]:
        return [tuple(part.clone() for part in self.parts) for _ in range(self.count)]

    def unquantized(self) -> list[Tensor]:
        return [self.dense.clone() for _ in range(max(1, self.count // 4))]

    def bytes(self) -> float:
        return self.n * self.k * (0.5 + (1 + 4 / 256) / 64)


def elementwise(setting: Setting) -> Iterator[Row]:
    from qlora_native import ops

    n = (1 << 14) if setting.emulate else (1 << 27)
    for dtype in (torch.float32, BF16):
        x = torch.randn(n, device=setting.device).to(dtype)
        packed, absmax = ops.quantize_4bit(x)
        out = torch.empty_like(x)
        least = n * (dtype.itemsize + 0.5 + 4 / 64)
        name = str(dtype).removeprefix("torch.")
        yield (
            f"quantize_4bit {name}",
            (least, 0),
            {OURS: lambda x=x, p=packed, s=absmax: [lambda: ops.quantize_4bit_out(x, p, s)]},
        )
        yield (
            f"dequantize_4bit {name}",
            (least, 0),
            {
                OURS: lambda p=packed, s=absmax, o=out: [
                    lambda: ops.dequantize_4bit_out(p, s, None, None, o)
                ]
            },
        )
    n //= 4
    lists = [[torch.rand(n, device=setting.device)] for _ in range(4)]
    yield "adamw 32-bit", (28 * n, 0), {OURS: lambda: [lambda: ops.adamw_step(*lists, **HYPER)]}
    codes = [[torch.zeros(n, dtype=torch.uint8, device=setting.device)] for _ in range(2)]
    blocks = [[torch.ones(n // 256, device=setting.device)] for _ in range(2)]
    yield (
        "adamw 8-bit",
        (16 * n, 0),
        {OURS: lambda: [lambda: ops.adamw_8bit_step(*lists[:2], *codes, *blocks, **HYPER)]},
    )


def bitsandbytes_linear(weights: Weights, x: Tensor) -> Sequence[Call]:
    import bitsandbytes.functional as bnb
    from bitsandbytes import matmul_4bit

    packed, state = bnb.quantize_4bit(weights.dense, compress_statistics=True, quant_type="nf4")
    matrices = [packed.clone() for _ in range(weights.count)]
    return [lambda w=w: matmul_4bit(x, w.t(), state) for w in matrices]


def linear(setting: Setting) -> Iterator[Row]:
    from qlora_native import ops

    n, k = (64, 128) if setting.emulate else (4096, 4096)
    weights = Weights(n, k, setting)
    rows = (1, 5) if setting.emulate else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

    def plainly(x: Tensor) -> Sequence[Call]:
        def call(w: tuple[Tensor, ...]) -> Tensor:
            dense = ops.dequantize_4bit(*w, (n, k), dtype=BF16)
            return torch.nn.functional.linear(x, dense)

        return [lambda w=w: call(w) for w in weights.quantized()]

    for m in rows:
        x = torch.randn(m, k, device=setting.device).to(BF16)
        grad = torch.randn(m, n, device=setting.device).to(BF16)
        least = (weights.bytes() + 2 * m * (n + k), 2.0 * m * n * k)
        contenders: dict[str, Callable[[], Sequence[Call]]] = {
            OURS: lambda x=x: [lambda w=w: ops.linear_4bit(x, *w, n) for w in weights.quantized()],
            "dequantize + cuBLAS": lambda x=x: plainly(x),
            "cuBLAS, un-quantized": lambda x=x: [
                lambda w=w: torch.nn.functional.linear(x, w) for w in weights.unquantized()
            ],
        }
        if setting.bitsandbytes or (setting.folder / "peer").exists():
            contenders["bitsandbytes"] = lambda x=x: bitsandbytes_linear(weights, x)
        yield f"linear_4bit {n} × {k}, M = {m}", least, contenders
        yield (
            f"input gradient {n} × {k}, M = {m}",
            least,
            {
                OURS: lambda g=grad: [
                    lambda w=w: ops.linear_4bit_backward_input(g, *w, k)
                    for w in weights.quantized()
                ],
                "cuBLAS, un-quantized": lambda g=grad: [
                    lambda w=w: torch.mm(g, w) for w in weights.unquantized()
                ],
            },
        )


def lora(setting: Setting) -> Iterator[Row]:
    """qlora_linear, then its gradients for x, A and B."""
    from qlora_native import ops

    n, k = (64, 128) if setting.emulate else (4096, 4096)
    weights = Weights(n, k, setting)
    a, b = (torch.randn(s, device=setting.device) * 0.05 for s in ((16, k), (n, 16)))
    for m in (5,) if setting.emulate else (512, 4096):
        x = torch.randn(m, k, device=setting.device).to(BF16)
        grad = torch.randn(m, n, device=setting.device).to(BF16)

        def ours(w: tuple[Tensor, ...], x: Tensor = x, grad: Tensor = grad) -> None:
            _, u = ops.qlora_linear(x, *w, 64, "nf4", None, a, b, 2.0)
            ops.qlora_linear_backward(grad, x, u, *w, 64, "nf4", a, b, 2.0)

        def unquantized(w: Tensor, x: Tensor = x, grad: Tensor = grad) -> None:
            a16, b16 = a.to(BF16), b.to(BF16)
            u = x @ a16.T
            torch.nn.functional.linear(x, w).add_(u @ b16.T, alpha=2.0)
            g = 2.0 * (grad @ b16)
            torch.mm(grad, w).add_(g @ a16)
            torch.mm(g.T, x), torch.mm(grad.T, u)

        flops = 2.0 * m * n * k * 2 + 12.0 * m * 16 * (n + k) / 2
        yield (
            f"qlora_linear forward + backward {n} × {k}, r = 16, M = {m}",
            (0, flops),
            {
                OURS: lambda ours=ours: [lambda w=w: ours(w) for w in weights.quantized()[:4]],
                "cuBLAS, un-quantized": lambda u=unquantized: [
                    lambda w=w: u(w) for w in weights.unquantized()[:4]
                ],
            },
        )


def measure(row: Row, rates: dict[str, float], device: torch.device) -> dict[str, Any]:
    name, (n_bytes, flops), contenders = row
    limit = max(n_bytes / rates["bytes_per_second"], flops / rates["flops"])
    by_memory = n_bytes / rates["bytes_per_second"] >= flops / rates["flops"]
    measured: dict[str, Any] = {}
    for contender, make in contenders.items():
        try:
            took = seconds(make(), device)
            measured[contender] = {"seconds": took, "of_limit": limit / took}
        except Exception as error:  # a row that fails is a result
            measured[contender] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"name": name, "limiter": "memory" if by_memory else "products", "measured": measured}


def main() -> None:
    setting = settings.of_stage(__doc__)
    settings.serve_by_cuda(setting)
    torch.manual_seed(0)
    rates = limits(setting.device, setting.emulate)
    result: dict[str, Any] = {"limits": rates, "rows": []}
    failed = False
    for rows in (elementwise, linear, lora):
        for row in rows(setting):
            result["rows"].append(measure(row, rates, setting.device))
            print(result["rows"][-1], flush=True)
            settings.write_result(setting, "microbench", result)
            failed |= "error" in result["rows"][-1]["measured"][OURS]
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
