"""functional: tensors with their state, against the reference and bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from qlora_native import functional as F
from qlora_native import reference

bnb = pytest.importorskip("bitsandbytes.functional")

SHAPES = {
    "matrix": (96, 50),
    "vector": (130,),
    "three dimensions": (3, 5, 7),
    "one value": (1,),
    "odd": (33,),
    "empty": (0, 8),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_round_trip_is_the_references(shape, format):
    torch.manual_seed(0)
    x = torch.randn(shape)
    packed, state = F.quantize_4bit(x, 32, format)
    want_packed, want_absmax = reference.quantize_4bit(x, 32, format)
    assert torch.equal(packed, want_packed) and torch.equal(state.absmax, want_absmax)
    got = F.dequantize_4bit(packed, state)
    want = reference.dequantize_4bit(packed, want_absmax, shape, 32, format, torch.float32)
    assert got.shape == x.shape and torch.equal(got, want)


@pytest.mark.parametrize("rounding", ["nearest", "bitsandbytes_cpu"])
def test_double_quantization_is_the_references(rounding):
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    packed, state = F.quantize_4bit(x, double_quant=True, scale_rounding=rounding)
    _, absmax = reference.quantize_4bit(x)
    codes, nested_absmax, _ = reference.quantize_scales(absmax, rounding, state.nested_offset)
    assert torch.equal(state.absmax, codes) and torch.equal(state.nested_absmax, nested_absmax)
    assert torch.allclose(state.nested_offset, absmax.mean(), rtol=1e-6)
    scales = reference.dequantize_scales(codes, nested_absmax, state.nested_offset)
    want = reference.dequantize_4bit(packed, scales, x.shape, dtype=torch.float32)
    assert torch.equal(F.dequantize_4bit(packed, state), want)


def test_bitsandbytes_cpu_rounding_is_the_packages_bits():
    torch.manual_seed(0)
    x = torch.randn(700, 64)
    packed, state = F.quantize_4bit(x, double_quant=True, scale_rounding="bitsandbytes_cpu")
    want_packed, want = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, want_packed) and torch.equal(state.absmax, want.absmax)
    assert torch.equal(state.nested_absmax, want.state2.absmax)
    assert state.nested_offset.item() == want.offset.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_gives_the_quantized_dtype_unless_told(dtype):
    x = torch.randn(64, 64).to(dtype)
    packed, state = F.quantize_4bit(x)
    assert F.dequantize_4bit(packed, state).dtype == dtype
    wide = F.dequantize_4bit(packed, state, torch.float32)
    assert torch.equal(F.dequantize_4bit(packed, state), wide.to(dtype))


def test_out_is_filled_and_returned():
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    want, state = F.quantize_4bit(x, double_quant=True)
    packed = torch.empty(2048, dtype=torch.uint8)
    got, got_state = F.quantize_4bit(x, double_quant=True, out=packed)
    assert got is packed and torch.equal(packed, want.view(-1)) and got_state == state
    out = torch.empty(64, 64, dtype=torch.bfloat16)
    assert F.dequantize_4bit(packed, state, out=out) is out
    assert torch.equal(out, F.dequantize_4bit(packed, state, torch.bfloat16))


def test_8bit_round_trip_and_out():
    torch.manual_seed(0)
    x = torch.randn(7, 100)
    codes, absmax = F.quantize_8bit(x)
    want_codes, want_absmax = reference.quantize_8bit(x)
    assert codes.shape == x.shape
    assert torch.equal(codes.view(-1), want_codes) and torch.equal(absmax, want_absmax)
    values = F.dequantize_8bit(codes, absmax)
    assert torch.equal(values.view(-1), reference.dequantize_8bit(codes, absmax).float())
    out = torch.empty_like(x)
    assert F.dequantize_8bit(codes, absmax, out=out) is out and torch.equal(out, values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_is_refused_with_double_quantization(bad):
    x = torch.ones(8, 64)
    x[1, 3] = x[5, 5] = bad
    counts = "2 NaN and 0 Inf" if bad != bad else "0 NaN and 2 Inf"
    with pytest.raises(ValueError, match=rf"layers.0.q_proj.weight \[8, 64\] holds {counts}"):
        F.quantize_4bit(x, double_quant=True, name="layers.0.q_proj.weight")
    packed, state = F.quantize_4bit(x)
    assert torch.equal(F.dequantize_4bit(packed, state)[[0, 2, 3, 4, 6, 7]], torch.ones(6, 64))
    _, state = F.quantize_4bit(x, double_quant=True, allow_nonfinite=True)
    assert not torch.isfinite(state.nested_offset)


def test_linear_and_qlora_linear_are_the_references():
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 64), torch.randn(48)
    a, b = torch.randn(4, 64), torch.randn(48, 4)
    packed, state = F.quantize_4bit(torch.randn(48, 64), double_quant=True)
    w = F.dequantize_4bit(packed, state).double()
    want = reference.linear(x, w, bias)
    assert torch.allclose(F.linear_4bit(x, packed, state, bias).double(), want, atol=1e-5)
    seed = torch.tensor([77])
    want = reference.qlora_linear(x, w, bias, a, b, 0.5, 0.25, 77)
    got = F.qlora_linear(x, packed, state, bias, a, b, 0.5, 0.25, seed)
    assert torch.allclose(got.double(), want, atol=1e-4)


REFUSED = {
    "blocksize": (lambda: F.quantize_4bit(torch.ones(4), blocksize=63), ValueError, "blocksize"),
    "format": (lambda: F.quantize_4bit(torch.ones(4), format="nf5"), ValueError, "format"),
    "dtype": (lambda: F.quantize_4bit(torch.ones(4).double()), TypeError, "x must have dtype"),
    "out": (
        lambda: F.quantize_4bit(torch.ones(4), out=torch.empty(3, dtype=torch.uint8)),
        ValueError,
        "packed",
    ),
    "packed": (
        lambda: F.dequantize_4bit(
            torch.zeros(9, dtype=torch.uint8), F.quantize_4bit(torch.ones(4))[1]
        ),
        ValueError,
        "packed must hold 2 bytes",
    ),
    "out's shape": (
        lambda: F.dequantize_4bit(*F.quantize_4bit(torch.ones(4)), out=torch.empty(5)),
        ValueError,
        r"out must have shape \[4\], got \[5\]",
    ),
    "dtype beside out": (
        lambda: F.dequantize_4bit(
            *F.quantize_4bit(torch.ones(4)), torch.float16, out=torch.empty(4)
        ),
        ValueError,
        "dtype must be out's",
    ),
    "a vector as weight": (
        lambda: F.linear_4bit(torch.ones(1, 4), *F.quantize_4bit(torch.ones(4))),
        ValueError,
        r"state must be of a matrix \[N, K\], got shape \[4\]",
    ),
    "scale_rounding": (
        lambda: F.quantize_4bit(torch.ones(4), double_quant=True, scale_rounding="up"),
        ValueError,
        "rounding",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
