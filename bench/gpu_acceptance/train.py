"""Stage: training steps of a stack of layers in an 8B model's shapes, LoRA on every linear.

The weights are random: what is shown is that it runs, its time and its memory. As many layers as
the card has room for, 32 at most.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.setting import Setting
from bench.shapes import LLAMA3_8B, Model

TINY = Model("tiny", hidden=64, intermediate=128, kv=32, layers=1)
_HEAD = 128
# Weight, adapters, their gradients and states, and what 2048 tokens keep for the backward pass.
_BYTES_A_LAYER = 800 << 20
_STEPS = 5


class Layer(nn.Module):
    """A decoder layer's linears around attention without positions, heads of 128 (or one)."""

    def __init__(self, model: Model, device: torch.device) -> None:
        super().__init__()
        from qlora_native.nn import Linear4bit, QLoRALinear

        self.linears = nn.ModuleDict()
        for name, (n, k) in model.linears.items():
            dense = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
            dense.weight.requires_grad_(False)
            base = Linear4bit.from_linear(dense)
            self.linears[name] = QLoRALinear.from_base(base, r=16, alpha=32)
        self.head = min(_HEAD, model.kv)
        norms = (nn.RMSNorm(model.hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.norms = nn.ModuleList(norm.requires_grad_(False) for norm in norms)

    def forward(self, x: Tensor) -> Tensor:
        f = self.linears
        normed = self.norms[0](x)
        q, k, v = (
            f[name](normed).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + f["o_proj"](mixed.transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        gated = nn.functional.silu(f["gate_proj"](normed)) * f["up_proj"](normed)
        return x + f["down_proj"](gated)


def train(setting: Setting) -> dict[str, Any]:
    from qlora_native.optim import AdamW8bit

    model, tokens = (TINY, (1, 8)) if setting.emulate else (LLAMA3_8B, (4, 512))
    layers = model.layers
    if not setting.emulate:
        free, _ = torch.cuda.mem_get_info()
        layers = min(layers, max(1, int(0.8 * free) // _BYTES_A_LAYER))
    stack = nn.Sequential(*(Layer(model, setting.device) for _ in range(layers)))
    x = torch.randn(*tokens, model.hidden, device=setting.device).to(torch.bfloat16)
    target = torch.randn_like(x)
    optimizer = AdamW8bit([p for p in stack.parameters() if p.requires_grad], lr=1e-3)
    losses, times = [], []
    for _ in range(1 if setting.emulate else _STEPS):
        begin = time.perf_counter()
        loss = (stack(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - begin)
    result = {
        "model": model.name, "layers": layers, "tokens": tokens[0] * tokens[1],
        "seconds_a_step": min(times), "losses": losses,
    }  # fmt: skip
    if not setting.emulate:
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def main() -> None:
    setting = settings.of_stage(__doc__)
    settings.serve_by_cuda(setting)
    torch.manual_seed(0)
    result = train(setting)
    settings.write_result(setting, "train", result)
    if not all(loss == loss and loss < 1e4 for loss in result["losses"]):
        raise SystemExit(f"losses {result['losses']}")


if __name__ == "__main__":
    main()
