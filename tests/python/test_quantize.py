"""quantize_4bit and quantize_8bit: the bits of bitsandbytes, on every instruction set."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from peer import bnb
from qlora_native import ops, reference
from quantize_cases import (
    BLOCKSIZES,
    DTYPES,
    FORMATS,
    cases,
    inputs,
    same_bits,
)

pytestmark = pytest.mark.emulated
ROUNDINGS = ["nearest", "bitsandbytes_cpu"]


# Name, input, wanted codes and wanted absmax; made once for all instruction sets.
Cases = list[tuple[str, Tensor, Tensor, Tensor]]


@cache
def cases_4bit(blocksize: int, format: str, dtype: torch.dtype) -> Cases:
    result = []
    for name, x in cases(blocksize, reference.codebook(format)):
        packed, state = bnb.quantize_4bit(x.to(dtype), blocksize=blocksize, quant_type=format)
        result.append((name, x.to(dtype), packed, state.absmax))
    return result


@cache
def cases_8bit(blocksize: int, signed: bool, dtype: torch.dtype, rounding: str) -> Cases:
    """What bitsandbytes does on a CPU, or, rounding to nearest, the reference."""
    result = []
    for name, x in cases(blocksize, reference.dynamic_map(signed)):
        x = (x if signed or name == "nan" else x.abs()).to(dtype)
        if rounding == "nearest":
            codes, absmax = reference.quantize_8bit(x, blocksize, signed)
        else:
            code = bnb.create_dynamic_map(signed=signed)
            codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, blocksize)
        result.append((name, x, codes, absmax))
    return result


# ---- 4-bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_4bit_is_bitsandbytes_to_the_bit(isa, sentinels, format, blocksize, dtype):
    for name, x, want_packed, want_absmax in cases_4bit(blocksize, format, dtype):
        packed = sentinels(want_packed.shape, torch.uint8)
        absmax = sentinels(want_absmax.shape)
        ops.quantize_4bit_out(x, packed, absmax, blocksize, format)
        assert same_bits(absmax, want_absmax), name
        assert same_bits(packed, want_packed), name


@pytest.mark.parametrize("format", FORMATS)
def test_4bit_is_the_reference(isa, format):
    for name, x in inputs(3 * 64 + 5, 64, reference.codebook(format)):
        for got, want in zip(
            ops.quantize_4bit(x, 64, format), reference.quantize_4bit(x, 64, format), strict=True
        ):
            assert same_bits(got, want), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64 * 4096, 64 * 4096 + 33])
def test_4bit_bits_do_not_depend_on_threads_or_isa(isa, threads, n, dtype):
    torch.manual_seed(0)
    x = torch.randn(n).to(dtype)
    packed, absmax = ops.quantize_4bit(x, 64, "nf4")
    want_packed, want_absmax = reference.quantize_4bit(x, 64, "nf4")
    assert same_bits(packed, want_packed) and same_bits(absmax, want_absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4bit_reads_views_where_they_lie(isa, sentinels, dtype):
    torch.manual_seed(0)
    n = 64 * 5 + 21
    for offset in (1, 3):
        x = sentinels(n, dtype, offset=offset * dtype.itemsize)
        x.copy_(torch.randn(n))
        packed, absmax = ops.quantize_4bit(x, 32, "nf4")
        want_packed, want_absmax = reference.quantize_4bit(x, 32, "nf4")
        assert same_bits(packed, want_packed) and same_bits(absmax, want_absmax)


def test_4bit_of_a_transposed_matrix_is_that_of_its_copy(isa):
    x = torch.arange(96.0).reshape(8, 12).t()
    for got, want in zip(ops.quantize_4bit(x, 32), ops.quantize_4bit(x.clone(), 32), strict=True):
        assert same_bits(got, want)


def test_a_nan_or_inf_stays_in_its_block(isa):
    torch.manual_seed(0)
    x = torch.randn(64 * 4)
    clean_packed, clean_absmax = ops.quantize_4bit(x, 64)
    x[64 + 3], x[128 + 9] = torch.nan, torch.inf
    packed, absmax = ops.quantize_4bit(x, 64)
    assert absmax[1].isnan() and absmax[2].isinf()
    for block in (0, 3):
        assert absmax[block] == clean_absmax[block]
        part = slice(block * 32, (block + 1) * 32)
        assert torch.equal(packed[part], clean_packed[part])


@pytest.mark.parametrize("format", FORMATS)
def test_4bit_of_nothing_is_nothing(isa, format):
    packed, absmax = ops.quantize_4bit(torch.empty(0, 5), 64, format)
    assert packed.numel() == 0 and absmax.numel() == 0


# ---- 8-bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_8bit_codes(isa, sentinels, rounding, signed, blocksize, dtype):
    for name, x, want_codes, want_absmax in cases_8bit(blocksize, signed, dtype, rounding):
        codes = sentinels(want_codes.shape, torch.uint8)
        absmax = sentinels(want_absmax.shape)
        ops.quantize_8bit_out(x, codes, absmax, blocksize, signed, rounding)
        assert same_bits(absmax, want_absmax), name
        assert same_bits(codes, want_codes), name


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8bit_nearest_is_nearest(isa, signed):
    torch.manual_seed(0)
    values = reference.dynamic_map(signed)
    x = torch.rand(256 * 64) * (2 if signed else 1) - (1 if signed else 0)
    x[::256] = 1.0
    codes, absmax = ops.quantize_8bit(x, 256, signed, "nearest")
    error = (x - values[codes.long()]).abs()
    assert torch.equal(absmax, torch.ones(64))
    assert (error <= (x.unsqueeze(1) - values).abs().amin(dim=1) + 1e-8).all()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8bit_ties_go_to_the_even_code(isa, signed):
    values = reference.dynamic_map(signed)
    x = torch.cat([(values[:-1] + values[1:]) / 2, torch.ones(1)])
    codes, _ = ops.quantize_8bit(x, 256, signed, "nearest")
    assert (codes[:-1] % 2 == 0).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_8bit_bits_do_not_depend_on_threads(isa, threads, rounding):
    torch.manual_seed(0)
    x = torch.randn(256 * 1024 + 77)
    codes, absmax = ops.quantize_8bit(x, 256, True, rounding)
    want_codes, want_absmax = reference.quantize_8bit(x, 256, True, rounding)
    assert same_bits(codes, want_codes) and same_bits(absmax, want_absmax)


def test_bitsandbytes_table_steps_all_of_them(isa):
    """Each of the 65,536 steps of its table, and the values half-way between two."""
    steps = (torch.arange(65536 * 2) - 65535.5) / 65535.5
    x = torch.cat([torch.ones(1), steps.float()])
    for signed in (True, False):
        codes, _ = ops.quantize_8bit(x, 4096, signed, "bitsandbytes_cpu")
        code = bnb.create_dynamic_map(signed=signed)
        want, _ = torch.ops.bitsandbytes.quantize_blockwise(x, code, 4096)
        assert torch.equal(codes, want)
