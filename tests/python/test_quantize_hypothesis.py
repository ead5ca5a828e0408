"""Any values, of any number, in any block size: codes as bitsandbytes has them, and a way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_native import ops, reference
from quantize_cases import BLOCKSIZES, DTYPES, FORMATS, same_bits

bnb = pytest.importorskip("bitsandbytes.functional")

ANY_FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=True)
FINITE_FLOAT32 = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)

# The isa fixture holds for all examples of a test, which is what is wanted of it.
examples = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def tensors(draw, elements):
    """A few drawn values spread over a length of up to three blocks: both edge and bulk."""
    blocksize = draw(st.sampled_from(BLOCKSIZES))
    n = draw(st.integers(1, 3 * blocksize))
    few = torch.tensor(draw(st.lists(elements, min_size=1, max_size=40)), dtype=torch.float32)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = few[torch.randint(few.numel(), (n,), generator=generator)]
    return x.to(draw(st.sampled_from(DTYPES))), blocksize


@examples
@given(tensors(ANY_FLOAT32), st.sampled_from(FORMATS))
def test_4bit_codes_are_bitsandbytes_bits(isa, case, format):
    x, blocksize = case
    packed, absmax = ops.quantize_4bit(x, blocksize, format)
    want, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=format)
    assert same_bits(packed, want) and same_bits(absmax, state.absmax)


@examples
@given(tensors(ANY_FLOAT32), st.booleans())
def test_8bit_codes_are_bitsandbytes_bits(isa, case, signed):
    x, blocksize = case
    codes, absmax = ops.quantize_8bit(x, blocksize, signed, "bitsandbytes_cpu")
    code = bnb.create_dynamic_map(signed=signed)
    want, state = bnb.quantize_blockwise(x, code=code, blocksize=blocksize)
    assert same_bits(codes, want) and same_bits(absmax, state.absmax)


@examples
@given(tensors(ANY_FLOAT32), st.booleans())
def test_8bit_nearest_is_the_reference(isa, case, signed):
    x, blocksize = case
    codes, absmax = ops.quantize_8bit(x, blocksize, signed, "nearest")
    want, want_absmax = reference.quantize_8bit(x, blocksize, signed)
    assert same_bits(codes, want) and same_bits(absmax, want_absmax)


@examples
@given(tensors(ANY_FLOAT32), st.sampled_from(FORMATS), st.sampled_from(DTYPES))
def test_4bit_values_are_the_reference(isa, case, format, dtype):
    x, blocksize = case
    packed, absmax = ops.quantize_4bit(x, blocksize, format)
    got = ops.dequantize_4bit(packed, absmax, None, None, x.shape, blocksize, format, dtype)
    assert same_bits(
        got, reference.dequantize_4bit(packed, absmax, x.shape, blocksize, format, dtype)
    )


@examples
@given(tensors(FINITE_FLOAT32), st.sampled_from(FORMATS))
def test_quantizing_what_was_dequantized_changes_nothing(isa, case, format):
    """The largest magnitude of a block is a codebook value times absmax, so it is met exactly."""
    x, blocksize = case
    packed, absmax = ops.quantize_4bit(x, blocksize, format)
    back = ops.dequantize_4bit(packed, absmax, None, None, x.shape, blocksize, format)
    again, absmax_again = ops.quantize_4bit(back, blocksize, format)
    twice = ops.dequantize_4bit(again, absmax_again, None, None, x.shape, blocksize, format)
    normal = absmax.repeat_interleave(blocksize)[: x.numel()] > 1e-30
    if (absmax_again == absmax).all():
        assert torch.equal(back[normal], twice[normal])
