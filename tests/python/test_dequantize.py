"""dequantize_4bit and dequantize_8bit: the bits of bitsandbytes, in every output dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peer import bnb
from qlora_native import ops, reference
from quantize_cases import BLOCKSIZES, DTYPES, FORMATS, same_bits

pytestmark = pytest.mark.emulated


def random_weight(n, blocksize):
    """Every code, and scales over all magnitudes, with zero, infinity and NaN among them."""
    generator = torch.Generator().manual_seed(n)
    packed = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    n_blocks = -(-n // blocksize)
    absmax = torch.exp2(torch.rand(n_blocks, generator=generator) * 40 - 30)
    for block, value in ((1, 0.0), (2, torch.inf), (3, torch.nan), (4, 1e-41)):
        if block < n_blocks:
            absmax[block] = value
    return packed, absmax


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_4bit_values_are_the_reference_bits(isa, sentinels, format, blocksize, dtype):
    for n in (1, 33, blocksize - 1, blocksize + 1, 6 * blocksize + 15):
        packed, absmax = random_weight(n, blocksize)
        out = sentinels(n, dtype)
        ops.dequantize_4bit_out(packed, absmax, None, None, out, blocksize, format)
        want = reference.dequantize_4bit(packed, absmax, (n,), blocksize, format, dtype)
        assert same_bits(out, want), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 1024])  # from 2048 on it starts torch.compile
@pytest.mark.parametrize("format", FORMATS)
def test_4bit_values_are_bitsandbytes_bits(isa, format, blocksize, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, blocksize)
    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=format)
    state.dtype = dtype
    got = ops.dequantize_4bit(packed, state.absmax, None, None, x.shape, blocksize, format, dtype)
    assert got.shape == x.shape and same_bits(got, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_quantized_scales_are_bitsandbytes_bits(isa, dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    want = bnb.dequantize_4bit(packed, state)
    scales = (state.absmax, state.state2.absmax, state.offset.reshape(1))
    got = ops.dequantize_4bit(packed, *scales, x.shape, 64, "nf4", dtype)
    assert same_bits(got, want)


def test_4bit_bits_do_not_depend_on_threads(isa, threads):
    n = 64 * 4096 + 33
    packed, absmax = random_weight(n, 64)
    absmax_q8, nested_absmax, nested_offset = ops.quantize_scales(absmax.nan_to_num(1.0, 1.0))
    got = ops.dequantize_4bit(packed, absmax_q8, nested_absmax, nested_offset, (n,))
    decoded = reference.dequantize_scales(absmax_q8, nested_absmax, nested_offset)
    assert same_bits(got, reference.dequantize_4bit(packed, decoded, (n,), dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4bit_writes_at_any_alignment(isa, sentinels, dtype):
    n = 64 * 7 + 9
    packed, absmax = random_weight(n, 64)
    want = reference.dequantize_4bit(packed, absmax, (n,), dtype=dtype)
    for offset in (1, 7):
        out = sentinels(n, dtype, offset=offset * dtype.itemsize)
        ops.dequantize_4bit_out(packed, absmax, None, None, out)
        assert same_bits(out, want)


def last_level_cache_bytes():
    """As cpp/cpu/cache.cpp reads it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip("K\n")) << 10 for size in sizes), default=32 << 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4bit_values_past_the_caches_are_the_same(isa, dtype):
    piece = 1 << 20
    pieces = last_level_cache_bytes() // (piece * dtype.itemsize) + 1
    if pieces > 128:
        pytest.skip("a test of so large a cache would take half a gigabyte")
    packed, absmax = random_weight(piece, 64)
    n = pieces * piece + 7
    packed = packed.repeat(pieces + 1)[: (n + 1) // 2]
    absmax = absmax.repeat(pieces + 1)[: -(-n // 64)]
    got = ops.dequantize_4bit(packed, absmax, None, None, (n,), 64, "nf4", dtype)
    first = packed[: piece // 2], absmax[: piece // 64]
    want = ops.dequantize_4bit(*first, None, None, (piece,), 64, "nf4", dtype)
    assert all(same_bits(part, want[: part.numel()]) for part in got.split(piece))


@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_is_off_by_at_most_half_a_step(isa, format):
    torch.manual_seed(0)
    x = torch.randn(64 * 100)
    packed, absmax = ops.quantize_4bit(x, 64, format)
    back = ops.dequantize_4bit(packed, absmax, None, None, x.shape, 64, format)
    values = reference.codebook(format).sort().values
    largest_step = float((values[1:] - values[:-1]).max())
    scale = absmax.repeat_interleave(64)
    assert ((x - back).abs() <= (largest_step / 2 + 1e-6) * scale).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8bit_values_are_bitsandbytes_bits(isa, sentinels, signed, blocksize, dtype):
    code = bnb.create_dynamic_map(signed=signed)
    for n in (1, 33, blocksize, blocksize + 1, 3 * blocksize + 7):
        generator = torch.Generator().manual_seed(n)
        codes = torch.randint(256, (n,), dtype=torch.uint8, generator=generator)
        absmax = torch.exp2(torch.rand(-(-n // blocksize), generator=generator) * 40 - 30)
        out = sentinels(n, dtype)
        ops.dequantize_8bit_out(codes, absmax, out, blocksize, signed)
        want = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, blocksize, dtype)
        assert same_bits(out, want), n


def test_8bit_bits_do_not_depend_on_threads(isa, threads):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (256 * 1024 + 9,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(1025, generator=generator)
    got = ops.dequantize_8bit(codes, absmax, 256, True)
    assert same_bits(got, reference.dequantize_8bit(codes, absmax).float())


def test_nothing_is_dequantized_to_nothing(isa):
    out = ops.dequantize_4bit(torch.empty(0, dtype=torch.uint8), torch.empty(0), None, None, (0, 7))
    assert out.shape == (0, 7)
