"""What every op computes, in plain torch: obvious, slow, float64. Tests hold the kernels to it.

Arithmetic is float64 except where the format itself is defined by fp32 steps (which code a value
gets, what a double-quantized scale decodes to): there the fp32 steps are done one by one.

Papers: QLoRA (Dettmers et al., 2023), LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023), 8-bit
optimizers via block-wise quantization (Dettmers et al., 2022), AdamW (Loshchilov & Hutter, 2019).
Bit layout: cpp/include/qlora_native/layout.h. Dropout mask: cpp/include/qlora_native/dropout.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256
OPTIMIZER_BLOCKSIZE = 256

# QLoRA, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# 1 sign bit, 2 exponent bits, 1 mantissa bit, scaled so that the largest value is 1.
_FP4_POSITIVE = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
)  # fmt: skip


def codebook(format: str) -> Tensor:
    """Value of each 4-bit code, fp32 [16]."""
    if format == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if format == "fp4":
        values = torch.tensor(_FP4_POSITIVE, dtype=torch.float32)
        return torch.cat([values, -values + 0.0])
    raise ValueError(f"format must be 'nf4' or 'fp4', got {format!r}")


def dynamic_map(signed: bool = True) -> Tensor:
    """Value of each code of the dynamic 8-bit type, ascending, fp32 [256] (8-bit optimizers, 2.1).

    Seven decades; decade i has 2^i (signed: and as many negative) or 2^(i+1) (unsigned) values, the
    midpoints of an even division of [0.1, 1], scaled by 10^(i-6). Zero and one complete it.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        n_values = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, n_values + 1, dtype=torch.float32)
        scaled = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [scaled, -scaled] if signed else [scaled]
    return torch.cat(values).sort().values


# ---- 4-bit ---------------------------------------------------------------------------------------


def quantize_4bit(x: Tensor, blocksize: int = 64, format: str = "nf4") -> tuple[Tensor, Tensor]:
    """x, any shape -> packed uint8 [ceil(n/2), 1], absmax fp32 [ceil(n/blocksize)] (QLoRA, eq. 1).

    The nearest value by the fp32 midpoints of the ascending values, a tie to the lower one. A full
    block multiplies by 1 / max(absmax, 1e-38); the last, partial one divides by max(absmax, 1e-38)
    and stores that.
    """
    values = codebook(format)
    order = values.argsort(stable=True)
    midpoints = (values[order][:-1] + values[order][1:]) / 2.0

    flat = x.detach().reshape(-1).to(torch.float32)
    n_full = flat.numel() // blocksize * blocksize
    full, tail = flat[:n_full].reshape(-1, blocksize), flat[n_full:]
    absmax = full.abs().amax(dim=1) if n_full else flat.new_zeros(0)
    normed = (full * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
    if tail.numel():
        tail_absmax = tail.abs().max().clamp(min=1e-38).reshape(1)
        absmax = torch.cat([absmax, tail_absmax])
        normed = torch.cat([normed, tail / tail_absmax])
    if normed.numel() % 2:
        normed = torch.cat([normed, normed.new_zeros(1)])

    codes = order[torch.bucketize(normed.clamp(-1.0, 1.0), midpoints)].to(torch.uint8)
    return (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1), absmax


def unpack(packed: Tensor, n: int) -> Tensor:
    """The codes of the first n values, int64 [n]; the high nibble comes first."""
    flat = packed.reshape(-1).to(torch.int64)
    return torch.stack([flat >> 4, flat & 0xF], dim=1).reshape(-1)[:n]


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: torch.Size | tuple[int, ...],
    blocksize: int = 64,
    format: str = "nf4",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """value(code) * absmax of its block (QLoRA, eq. 2).

    Exact in float64; any other dtype gets the product rounded to fp32, then to it.
    """
    n = torch.Size(shape).numel()
    scale = absmax.to(torch.float64).repeat_interleave(blocksize)[:n]
    exact = codebook(format).to(torch.float64)[unpack(packed, n)] * scale
    exact = exact.reshape(shape)
    return exact if dtype == torch.float64 else exact.to(torch.float32).to(dtype)


# ---- 8-bit and double quantization ---------------------------------------------------------------


def _nearest_ties_to_even(normed: Tensor, values: Tensor) -> Tensor:
    midpoints = (values[:-1] + values[1:]) / 2.0
    codes = torch.bucketize(normed, midpoints)  # a tie to the lower code
    on_midpoint = normed == midpoints[codes.clamp(max=midpoints.numel() - 1)]
    return codes + (on_midpoint & (codes % 2 == 1)).to(codes.dtype)


def _by_table(normed: Tensor, values: Tensor) -> Tensor:
    """bitsandbytes on a CPU: [-1, 1] in 65,536 steps, each with the code nearest to its value."""
    steps = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535.0
    table = torch.bucketize(steps, (values[:-1] + values[1:]) / 2.0)
    step = ((normed.nan_to_num(nan=-1.0) + 1.0) * 0.5) * 65535.0 + 0.5
    return table[step.to(torch.int64)]


def quantize_8bit(
    x: Tensor, blocksize: int = 256, signed: bool = True, rounding: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """x, any shape -> codes uint8 [n] and absmax fp32 [ceil(n/blocksize)] (8-bit optimizers, 2.2).

    rounding: "nearest" by the fp32 midpoints, a tie to the even code: x * (1 / max(absmax, 1e-38)),
    and a NaN makes its block's absmax NaN. "bitsandbytes_cpu": x * (1 / absmax), of the values that
    are not NaN. Either way NaN gets code 0.
    """
    values = dynamic_map(signed)
    flat = x.detach().reshape(-1).to(torch.float32)
    n_blocks = -(-flat.numel() // blocksize)
    blocks = torch.nn.functional.pad(flat, (0, n_blocks * blocksize - flat.numel()))
    blocks = blocks.reshape(n_blocks, blocksize)
    if rounding == "bitsandbytes_cpu":
        absmax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
        inverse, encode = 1.0 / absmax, _by_table
    elif rounding == "nearest":
        absmax = blocks.abs().amax(dim=1)
        inverse, encode = 1.0 / absmax.clamp(min=1e-38), _nearest_ties_to_even
    else:
        raise ValueError(f"rounding must be 'nearest' or 'bitsandbytes_cpu', got {rounding!r}")
    normed = (blocks * inverse.unsqueeze(1)).reshape(-1)[: flat.numel()]
    normed = normed.nan_to_num(nan=-1.0, posinf=1.0, neginf=-1.0).clamp(-1.0, 1.0)
    return encode(normed, values).to(torch.uint8), absmax


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, blocksize: int = 256, signed: bool = True
) -> Tensor:
    """value(code) * absmax of its block, float64 [n], exact."""
    n = codes.numel()
    scale = absmax.to(torch.float64).repeat_interleave(blocksize)[:n]
    return dynamic_map(signed).to(torch.float64)[codes.reshape(-1).to(torch.int64)] * scale


def quantize_scales(
    absmax: Tensor, rounding: str = "nearest", offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization (QLoRA, section 3) of absmax fp32 [n].

    -> codes uint8 [n], nested absmax fp32 [ceil(n/256)], offset fp32 [1]: the mean, torch's unless
    one is given.
    """
    offset = absmax.mean().reshape(1) if offset is None else offset
    codes, nested_absmax = quantize_8bit(absmax - offset, NESTED_BLOCKSIZE, True, rounding)
    return codes, nested_absmax, offset


def dequantize_scales(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 [n]: two fp32 roundings, one after the product and one after the sum."""
    scaled = dequantize_8bit(codes, nested_absmax, NESTED_BLOCKSIZE).to(torch.float32)
    return scaled + offset


# ---- linear --------------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF


def _as_int64(value: int) -> int:
    """The int64 with the bits of this uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 read as uint64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def dropout_bits(seed: int, rows: int, cols: int) -> Tensor:
    """32 random bits for each element, int64 [rows, cols], a function of (seed, row, column) alone.

    dropout.h in int64: its products and sums wrap as uint64's do.
    """
    row = torch.arange(rows, dtype=torch.int64)
    z = seed + _as_int64(0x9E3779B97F4A7C15) * (row + 1)
    z = (z ^ _shift_right(z, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _as_int64(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    add, mix = (z & _MASK32).unsqueeze(1), _shift_right(z, 32).unsqueeze(1)

    x = (torch.arange(cols, dtype=torch.int64).unsqueeze(0) + add) & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = (((x ^ (x >> 15)) + mix) & _MASK32) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def dropout_mask(seed: int, rows: int, cols: int, p: float) -> Tensor:
    """Which elements of x [rows, cols] are kept, bool: those whose upper 31 bits reach p * 2^31."""
    p32 = float(torch.tensor(p, dtype=torch.float32))
    return (dropout_bits(seed, rows, cols) >> 1) >= int(p32 * 2147483648.0 + 0.5)


def dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """x [M, K] with dropped elements 0 and kept ones times 1 / (1 - p), the gain in fp32."""
    gain = 1.0 / (1.0 - torch.tensor(p, dtype=torch.float32))
    mask = dropout_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(mask, x * gain.to(x.dtype), torch.zeros((), dtype=x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, float64 [..., N]."""
    y = x.to(torch.float64) @ weight.to(torch.float64).T
    return y if bias is None else y + bias.to(torch.float64)


def qlora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """y = x W^T + bias + scale * (drop(x) A^T) B^T, float64 [..., N] (QLoRA, eq. 5).

    Differentiable: its gradients, by torch's autograd, are the reference of the backward op.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(torch.float64)
    dropped = dropout(rows, seed, dropout_p) if dropout_p > 0.0 else rows
    u = dropped @ lora_a.to(torch.float64).T
    y = linear(rows, weight, bias) + scale * (u @ lora_b.to(torch.float64).T)
    return y.reshape(*x.shape[:-1], weight.shape[0])


# ---- optimizer -----------------------------------------------------------------------------------


@dataclass
class AdamWHyper:
    """Hyperparameters of one step; `step` is 1 in the first."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    step: int = 1
    maximize: bool = False
    grad_scale: float = 1.0


def adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: AdamWHyper
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step (Loshchilov & Hutter, algorithm 2), float64: new param, exp_avg, exp_avg_sq.

    torch.optim.AdamW's order: decay first, eps added after the bias correction of the root.
    """
    p, m, v = (t.to(torch.float64) for t in (param, exp_avg, exp_avg_sq))
    g = grad.to(torch.float64) / hyper.grad_scale
    g = -g if hyper.maximize else g
    p = p * (1.0 - hyper.lr * hyper.weight_decay)
    m = hyper.beta1 * m + (1.0 - hyper.beta1) * g
    v = hyper.beta2 * v + (1.0 - hyper.beta2) * g * g
    correction1 = 1.0 - hyper.beta1**hyper.step
    correction2 = 1.0 - hyper.beta2**hyper.step
    denominator = v.sqrt() / correction2**0.5 + hyper.eps
    return p - hyper.lr / correction1 * m / denominator, m, v


def lion(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """One Lion step (Chen et al., 2023, algorithm 2), float64: new param and exp_avg."""
    p, g, m = (t.to(torch.float64) for t in (param, grad, exp_avg))
    direction = (beta1 * m + (1.0 - beta1) * g).sign()
    return p - lr * (direction + weight_decay * p), beta2 * m + (1.0 - beta2) * g


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of torch.optim.SGD, float64: new param and buffer (None in the first step)."""
    p = param.to(torch.float64)
    g = grad.to(torch.float64) + weight_decay * p
    if momentum_buffer is None:
        m = g
    else:
        m = momentum * momentum_buffer.to(torch.float64) + (1.0 - dampening) * g
    return p - lr * (g + momentum * m if nesterov else m), m


@dataclass
class State8bit:
    """Blockwise 8-bit optimizer state: codes uint8 [n], absmax fp32 [ceil(n/256)] per moment."""

    exp_avg: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor


def adamw_8bit(
    param: Tensor, grad: Tensor, state: State8bit, hyper: AdamWHyper
) -> tuple[Tensor, State8bit]:
    """One AdamW step with 8-bit moments: decode, step, encode to nearest (8-bit optimizers, 2)."""
    m = dequantize_8bit(state.exp_avg, state.exp_avg_absmax, OPTIMIZER_BLOCKSIZE, signed=True)
    v = dequantize_8bit(
        state.exp_avg_sq, state.exp_avg_sq_absmax, OPTIMIZER_BLOCKSIZE, signed=False
    )
    p, m, v = adamw(param.reshape(-1), grad.reshape(-1), m, v, hyper)
    m_codes, m_absmax = quantize_8bit(m, OPTIMIZER_BLOCKSIZE, signed=True)
    v_codes, v_absmax = quantize_8bit(v, OPTIMIZER_BLOCKSIZE, signed=False)
    return p.reshape(param.shape), State8bit(m_codes, m_absmax, v_codes, v_absmax)
