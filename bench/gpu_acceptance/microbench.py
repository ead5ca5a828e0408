"""Stage: ours beside the peers; each row with its fraction of what was measured on this device.

Rows in which ours is the slower one are marked. One that fails has its error in
place of its seconds, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu_acceptance import peers
from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.every_op import HYPER
from bench.gpu_acceptance.setting import Setting
from bench.gpu_acceptance.timing import Call, copies, seconds

BF16 = torch.bfloat16
OURS = "ours"
# What a call needs at least: bytes over the bus, floating-point operations.
Least = tuple[float, float]
Contenders = dict[str, Callable[[], Sequence[Call]]]
Row = tuple[str, Least, Contenders]
# What an optimizer keeps of each value, and its settings.
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "AdamW": (2, HYPER),
    "Lion": (1, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}),
    "SGD": (1, {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}),
}


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
    """The same matrix as often as it takes to pass the caches: 4-bit, and in bf16."""

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


def with_bitsandbytes(
    setting: Setting, contenders: Contenders, make: Callable[[], Sequence[Call]]
) -> Contenders:
    here = peers.bitsandbytes_is_here(setting)
    return {**contenders, peers.BITSANDBYTES: make} if here else contenders


def elementwise(setting: Setting) -> Iterator[Row]:
    """Quantization both ways: 4-bit in blocks of 64, 8-bit in blocks of 256."""
    from qlora_native import ops

    n = (1 << 14) if setting.emulate else (1 << 27)
    for dtype in (torch.float32, BF16):
        x = torch.randn(n, device=setting.device).to(dtype)
        out = torch.empty_like(x)
        name = str(dtype).removeprefix("torch.")
        packed, absmax = ops.quantize_4bit(x)
        codes, scales = ops.quantize_8bit(x)
        work: dict[str, tuple[float, Call, Callable[[], Sequence[Call]]]] = {
            "quantize_4bit": (
                0.5 + 4 / 64,
                lambda x=x, p=packed, s=absmax: ops.quantize_4bit_out(x, p, s),
                lambda x=x: peers.quantize_4bit(x),
            ),
            "dequantize_4bit": (
                0.5 + 4 / 64,
                lambda p=packed, s=absmax, o=out: ops.dequantize_4bit_out(p, s, None, None, o),
                lambda x=x: peers.dequantize_4bit(x),
            ),
            "quantize_8bit": (
                1 + 4 / 256,
                lambda x=x, c=codes, s=scales: ops.quantize_8bit_out(x, c, s),
                lambda x=x: peers.quantize_blockwise(x),
            ),
            "dequantize_8bit": (
                1 + 4 / 256,
                lambda c=codes, s=scales, o=out: ops.dequantize_8bit_out(c, s, o),
                lambda x=x: peers.dequantize_blockwise(x),
            ),
        }
        for op, (compressed, call, theirs) in work.items():
            least = n * (dtype.itemsize + compressed)
            contenders = with_bitsandbytes(setting, {OURS: lambda c=call: [c]}, theirs)
            yield f"{op} {name}", (least, 0), contenders


def our_step(rule: str, bits: int, n: int, device: torch.device) -> Sequence[Call]:
    from qlora_native import ops

    moments, hyper = RULES[rule]
    params, grads = ([torch.rand(n, device=device)] for _ in range(2))
    if bits == 32:
        step = getattr(ops, f"{rule.lower()}_step")
        state = [[torch.zeros(n, device=device)] for _ in range(moments)]
    else:
        step = getattr(ops, f"{rule.lower()}_8bit_step")
        state = [[torch.zeros(n, dtype=torch.uint8, device=device)] for _ in range(moments)]
        state += [[torch.ones(n // 256, device=device)] for _ in range(moments)]
    return [lambda: step(params, grads, *state, **hyper)]


def optimizers(setting: Setting) -> Iterator[Row]:
    """Steps over one fp32 tensor; SGD with momentum."""
    n = (1 << 12) if setting.emulate else (1 << 25)
    for rule, (moments, _) in RULES.items():
        for bits in (32, 8):
            # The parameter read and written, its gradient read; the state read and written.
            least = n * (12 + moments * bits / 4)
            contenders: Contenders = {
                OURS: lambda r=rule, b=bits: our_step(r, b, n, setting.device),
                f"torch's fused {peers.TORCH_FUSED[rule]}": lambda r=rule: peers.torch_step(
                    r, n, setting.device
                ),
            }
            yield (
                f"{rule} {bits}-bit",
                (least, 0),
                with_bitsandbytes(
                    setting,
                    contenders,
                    lambda r=rule, b=bits: peers.bitsandbytes_step(r, b, n, setting.device),
                ),
            )


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
        contenders: Contenders = {
            OURS: lambda x=x: [lambda w=w: ops.linear_4bit(x, *w, n) for w in weights.quantized()],
            "dequantize + cuBLAS": lambda x=x: plainly(x),
            "cuBLAS, un-quantized": lambda x=x: [
                lambda w=w: torch.nn.functional.linear(x, w) for w in weights.unquantized()
            ],
        }
        yield (
            f"linear_4bit {n} × {k}, M = {m}",
            least,
            with_bitsandbytes(
                setting, contenders, lambda x=x: peers.linear(weights.dense, weights.count, x)
            ),
        )
        contenders = {
            OURS: lambda g=grad: [
                lambda w=w: ops.linear_4bit_backward_input(g, *w, k) for w in weights.quantized()
            ],
            "cuBLAS, un-quantized": lambda g=grad: [
                lambda w=w: torch.mm(g, w) for w in weights.unquantized()
            ],
        }
        yield (
            f"input gradient {n} × {k}, M = {m}",
            least,
            with_bitsandbytes(
                setting,
                contenders,
                lambda g=grad: peers.input_gradient(weights.dense, weights.count, g),
            ),
        )


def lora(setting: Setting) -> Iterator[Row]:
    """qlora_linear, then its gradients for x, A and B."""
    from qlora_native import ops

    n, k = (64, 128) if setting.emulate else (4096, 4096)
    weights = Weights(n, k, setting)
    a, b = (torch.randn(s, device=setting.device) * 0.05 for s in ((16, k), (n, 16)))
    adapter, count = peers.Adapter(a, b, 2.0), min(weights.count, 4)
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
        contenders: Contenders = {
            OURS: lambda ours=ours: [lambda w=w: ours(w) for w in weights.quantized()[:4]],
            "cuBLAS, un-quantized": lambda u=unquantized: [
                lambda w=w: u(w) for w in weights.unquantized()[:4]
            ],
        }
        yield (
            f"qlora_linear forward + backward {n} × {k}, r = 16, M = {m}",
            (0, flops),
            with_bitsandbytes(
                setting,
                contenders,
                lambda x=x, g=grad: peers.lora(weights.dense, count, x, g, adapter),
            ),
        )


def slower_than(measured: dict[str, Any]) -> list[str]:
    """The peers that ours loses to."""
    ours = measured[OURS].get("seconds", float("inf"))
    return [name for name, of in measured.items() if of.get("seconds", float("inf")) < ours]


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
    return {
        "name": name,
        "limiter": "memory" if by_memory else "products",
        "measured": measured,
        "slower_than": slower_than(measured),
    }


def main() -> None:
    setting = settings.of_stage(__doc__)
    settings.serve_by_cuda(setting)
    torch.manual_seed(0)
    rates = limits(setting.device, setting.emulate)
    result: dict[str, Any] = {"limits": rates, "rows": []}
    failed = False
    for rows in (elementwise, optimizers, linear, lora):
        for row in rows(setting):
            result["rows"].append(measure(row, rates, setting.device))
            print(result["rows"][-1], flush=True)
            settings.write_result(setting, "microbench", result)
            failed |= "error" in result["rows"][-1]["measured"][OURS]
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
