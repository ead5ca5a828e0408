"""Double quantization: quantize_scales and dequantize_scales."""

from __future__ import annotations

import pytest
import torch

from peer import bnb
from qlora_native import ops, reference
from quantize_cases import same_bits

pytestmark = pytest.mark.emulated

LENGTHS = [1, 2, 7, 8, 9, 255, 256, 257, 1000, 4096, 65537]


def scales(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.1 + 0.01


@pytest.mark.parametrize("n", LENGTHS)
def test_bitsandbytes_rounding_is_its_bits(isa, threads, n):
    """The whole of what it stores, given torch's mean, which it takes."""
    x = torch.randn(n * 64, generator=torch.Generator().manual_seed(n))
    _, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    _, absmax = ops.quantize_4bit(x, 64, "nf4")
    offset = absmax.mean().reshape(1)
    codes, nested_absmax, nested_offset = ops.quantize_scales(absmax, "bitsandbytes_cpu", offset)
    assert same_bits(nested_offset, state.offset)
    assert same_bits(nested_absmax, state.state2.absmax)
    assert same_bits(codes, state.absmax)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("rounding", ["nearest", "bitsandbytes_cpu"])
def test_scales_are_the_reference_bits(isa, n, rounding):
    absmax = scales(n)
    exact_mean = absmax.double().mean().float().reshape(1)
    got = ops.quantize_scales(absmax, rounding)
    want = reference.quantize_scales(absmax, rounding, exact_mean)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n", LENGTHS)
def test_decoded_scales_are_bitsandbytes_bits(isa, threads, n):
    codes, nested_absmax, nested_offset = ops.quantize_scales(scales(n))
    code = bnb.create_dynamic_map(signed=True)
    scaled = torch.ops.bitsandbytes.dequantize_blockwise(
        codes, nested_absmax, code, 256, torch.float32
    )
    got = ops.dequantize_scales(codes, nested_absmax, nested_offset)
    assert same_bits(got, scaled + nested_offset)


def test_equal_scales_come_back_exactly(isa):
    """A block of zeros after the mean is taken off: nothing is lost."""
    absmax = torch.full((512,), 0.25)
    for rounding in ("nearest", "bitsandbytes_cpu"):
        assert same_bits(ops.dequantize_scales(*ops.quantize_scales(absmax, rounding)), absmax)


def test_the_mean_does_not_depend_on_threads(isa, threads):
    absmax = scales(300_001)
    nested_offset = ops.quantize_scales(absmax)[2]
    assert float(nested_offset) == float(absmax.double().mean().float())


def test_no_scales(isa):
    codes, nested_absmax, nested_offset = ops.quantize_scales(torch.empty(0))
    assert codes.numel() == 0 and nested_absmax.numel() == 0 and float(nested_offset) == 0.0


def test_a_bad_offset_is_named():
    with pytest.raises(ValueError, match="offset must hold n=1 values"):
        ops.quantize_scales(torch.ones(4), offset=torch.ones(2))
    with pytest.raises(TypeError, match="offset"):
        ops.quantize_scales(torch.ones(4), offset=torch.ones(1, dtype=torch.float64))
