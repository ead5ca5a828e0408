"""Calls every op once, on odd and on even sizes, and prints how many: what the sanitizer watches.

Values are the tests' business. An op that fails ends the program.
"""

from __future__ import annotations

import torch

from bench.gpu_acceptance import setting as settings

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 1}


def call_all(device: torch.device, n: int, k: int, m: int, dtype: torch.dtype) -> int:
    from qlora_native import ops

    weight = torch.randn(n, k, device=device).to(dtype)
    packed, absmax = ops.quantize_4bit(weight)
    scales = ops.quantize_scales(absmax)
    ops.dequantize_scales(*scales)
    ops.dequantize_4bit(packed, *scales, (n, k), dtype=dtype)
    ops.dequantize_8bit(*ops.quantize_8bit(weight, 256), 256)
    x, grad = (torch.randn(m, size, device=device).to(dtype) for size in (k, n))
    ops.linear_4bit(x, packed, *scales, n)
    ops.linear_4bit_backward_input(grad, packed, *scales, k)
    a, b = torch.randn(16, k, device=device), torch.randn(n, 16, device=device)
    lora = (64, "nf4", a, b, 2.0)
    _, u = ops.qlora_linear(x, packed, *scales, *lora[:2], None, *lora[2:])
    ops.qlora_linear_backward(grad, x, u, packed, *scales, *lora)
    lists = [[torch.rand(n * k, device=device)] for _ in range(4)]
    ops.adamw_step(*lists, **HYPER)
    codes = [[torch.zeros(n * k, dtype=torch.uint8, device=device)] for _ in range(2)]
    blocks = [[torch.ones(-(-n * k // 256), device=device)] for _ in range(2)]
    ops.adamw_8bit_step(*lists[:2], *codes, *blocks, **HYPER)
    return 13


def main() -> None:
    setting = settings.of_stage(__doc__)
    settings.serve_by_cuda(setting)
    called = 0
    for n, k in ((40, 128), (33, 77)):
        for m in (1, 5, 40):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                called += call_all(setting.device, n, k, m, dtype)
    if not setting.emulate:
        torch.cuda.synchronize()
    print(f"{called} calls")


if __name__ == "__main__":
    main()
