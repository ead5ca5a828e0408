"""The reference against what it claims to be: bitsandbytes' bits, torch's AdamW, dropout.h's."""

from __future__ import annotations

import pytest
import torch

from qlora_native import reference

bnb = pytest.importorskip("bitsandbytes.functional")

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_4bit_codes_and_absmax_are_bitsandbytes_bits(format, blocksize, dtype):
    torch.manual_seed(0)
    x = torch.randn(3 * blocksize + 7, dtype=torch.float32).to(dtype)
    x[:blocksize] = 0
    want_packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=format)
    packed, absmax = reference.quantize_4bit(x, blocksize, format)
    assert torch.equal(packed, want_packed)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("case", ["inf", "nan", "subnormal", "tiny", "constant", "zero tail"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_special_blocks_are_bitsandbytes_bits(case, format):
    torch.manual_seed(0)
    x = torch.randn(200)
    if case in ("inf", "nan"):
        x[5] = x[199] = float(case)
    elif case == "subnormal":
        x = x * 1e-40
    elif case == "tiny":
        x[1:] *= 1e-3
    elif case == "constant":
        x[:] = -0.25
    else:
        x[128:] = 0
    want_packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type=format)
    packed, absmax = reference.quantize_4bit(x, 64, format)
    assert torch.equal(packed, want_packed)
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantized_values_are_bitsandbytes_bits(format, dtype):
    torch.manual_seed(0)
    x = torch.randn(17, 34)
    packed, state = bnb.quantize_4bit(x, blocksize=32, quant_type=format)
    state.dtype = dtype
    want = bnb.dequantize_4bit(packed, state)
    got = reference.dequantize_4bit(packed, state.absmax, x.shape, 32, format, dtype)
    assert torch.equal(got, want)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed):
    assert torch.equal(reference.dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_8bit_table_rounding_is_bitsandbytes_bits(signed):
    torch.manual_seed(0)
    x = torch.randn(100_003)
    x = x if signed else x.abs()
    x[:256] = 0
    x[300] = torch.nan
    codes, absmax = reference.quantize_8bit(x, 256, signed, "bitsandbytes_cpu")
    want, state = bnb.quantize_blockwise(
        x, code=bnb.create_dynamic_map(signed=signed), blocksize=256
    )
    assert torch.equal(codes, want)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("signed", [True, False])
def test_8bit_nearest_is_nearest_and_ties_go_to_even(signed):
    values = reference.dynamic_map(signed)
    midpoints = (values[:-1] + values[1:]) / 2
    codes, _ = reference.quantize_8bit(torch.cat([midpoints, torch.ones(1)]), 256, signed)
    assert (codes[:-1] % 2 == 0).all()
    torch.manual_seed(0)
    x = torch.rand(10_000) * 2 - 1 if signed else torch.rand(10_000)
    x[::256] = 1.0
    codes, _ = reference.quantize_8bit(x, 256, signed)
    nearest = (x.unsqueeze(1) - values).abs().amin(dim=1)
    assert torch.allclose((x - values[codes.long()]).abs(), nearest, atol=1e-7, rtol=0)


def test_double_quantization_round_trip_is_bitsandbytes_bits():
    torch.manual_seed(0)
    absmax = torch.rand(1000) + 0.5
    codes, nested_absmax, offset = reference.quantize_scales(absmax, "bitsandbytes_cpu")
    want, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(codes, want) and torch.equal(nested_absmax, state.absmax)
    decoded = bnb.dequantize_blockwise(want, state) + absmax.mean()
    assert torch.equal(reference.dequantize_scales(codes, nested_absmax, offset), decoded)


# (seed, row, column, bits): dropout_bits(dropout_row_key(seed, row), column) of the header.
DROPOUT_BITS = [
    (0, 0, 0, 0xDD028AB4),
    (0, 7, 1, 0xADF25743),
    (0, 123, 255, 0x52E8DF17),
    (1, 0, 0, 0x565A80CA),
    (1, 7, 1, 0xF4B2A31E),
    (1, 123, 255, 0xA6877C37),
    (-1, 0, 0, 0x84CE82A4),
    (-1, 7, 1, 0xB9B249FF),
    (-1, 123, 255, 0x5777D85D),
    (1234567890123456789, 0, 0, 0x71BB939A),
    (1234567890123456789, 7, 1, 0x13DC0BBE),
    (1234567890123456789, 123, 255, 0x21506988),
    (-(2**63), 0, 0, 0x018BC519),
    (-(2**63), 7, 1, 0x225F7981),
    (-(2**63), 123, 255, 0xF457D23C),
]


@pytest.mark.parametrize(("seed", "row", "column", "bits"), DROPOUT_BITS)
def test_dropout_bits_are_the_headers(seed, row, column, bits):
    assert reference.dropout_bits(seed, row + 1, column + 1)[row, column] == bits


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    x = torch.ones(400, 500, dtype=torch.float64)
    dropped = reference.dropout(x, 1234, p)
    assert abs(dropped.mean().item() - 1) < 5 * (p / (1 - p) / x.numel()) ** 0.5 + 1e-6
    mask = dropped != 0
    assert abs(mask.double().mean(0).std().item() - (p * (1 - p) / 400) ** 0.5) < 0.01


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_torchs(maximize):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    optimizer = torch.optim.AdamW([param], lr=1e-2, weight_decay=0.1, maximize=maximize)
    p, m, v = param.detach().clone(), torch.zeros_like(param), torch.zeros_like(param)
    for step in range(1, 6):
        param.grad = torch.randn_like(param)
        hyper = reference.AdamWHyper(lr=1e-2, weight_decay=0.1, step=step, maximize=maximize)
        p, m, v = reference.adamw(p, param.grad, m, v, hyper)
        optimizer.step()
    assert torch.allclose(p, param, rtol=1e-13, atol=1e-15)


def test_adamw_8bit_follows_the_32bit_path():
    torch.manual_seed(0)
    p32 = p8 = torch.randn(3, 300, dtype=torch.float64)
    m = v = torch.zeros_like(p32)
    zero = torch.zeros(900)
    state = reference.State8bit(
        *reference.quantize_8bit(zero), *reference.quantize_8bit(zero, signed=False)
    )
    for step in range(1, 11):
        grad = torch.randn_like(p32)
        hyper = reference.AdamWHyper(step=step)
        p32, m, v = reference.adamw(p32, grad, m, v, hyper)
        p8, state = reference.adamw_8bit(p8, grad, state, hyper)
    assert (p8 - p32).abs().max() < 10 * 1e-3 * 0.3


def test_qlora_linear_gradients_by_finite_differences():
    torch.manual_seed(0)
    weight = torch.randn(5, 6, dtype=torch.float64)
    x, a, b, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(4, 6), (2, 6), (5, 2), (5,)]
    )
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: reference.qlora_linear(x, weight, bias, a, b, 0.5, 0.25, seed=9),
        (x, a, b, bias),
    )
