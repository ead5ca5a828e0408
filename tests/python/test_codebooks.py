"""The compiled codebooks, re-derived from their definitions and compared with the package."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

import qlora_native
from qlora_native import reference
from quantize_cases import FORMATS, same_bits

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("format", FORMATS)
def test_4bit_codebook_is_the_package_s(format):
    ours = torch.tensor(qlora_native.codebook(format))
    assert same_bits(ours, bnb.get_4bit_type(format, device="cpu"))
    assert same_bits(ours, reference.codebook(format))


def test_nf4_is_quantiles_of_the_normal_distribution():
    """QLoRA, section 3: eight quantiles below zero and nine above, scaled so that the ends are 1.

    The tail probability 1 - 0.9677083 is the mean of 1/30 and 1/32, as in the paper's code.
    """
    quantile = NormalDist().inv_cdf
    offset = 1 - (1 / 32 + 1 / 30) / 2
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*negative, 0.0, *positive])) / quantile(offset)
    assert torch.allclose(torch.tensor(qlora_native.codebook("nf4")), values, atol=2e-7, rtol=0)


def test_fp4_is_one_sign_two_exponent_and_one_mantissa_bit():
    """s eem: 2^(e - 4) (1 + m / 2) * 4/3 for e > 0; both of e = 0 are special: 0 and 2^-6 / 3."""
    values = qlora_native.codebook("fp4")
    for code in range(16):
        exponent_by_field = {1: 0, 2: -1, 3: -2}  # the field counts down, in the package's order
        field, mantissa = (code >> 1) & 3, code & 1
        if field == 0:
            magnitude = 2**-6 / 3 if mantissa else 0.0
        else:
            magnitude = 2.0 ** exponent_by_field[field] * (1.0 if mantissa else 2 / 3)
        expected = -magnitude if code & 8 else magnitude
        assert math.isclose(values[code], expected, rel_tol=1e-6, abs_tol=0.0)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_dynamic_map_is_the_package_s_and_the_definition_s(signed):
    ours = torch.tensor(qlora_native.dynamic_map(signed))
    assert same_bits(ours, bnb.create_dynamic_map(signed=signed))
    assert same_bits(ours, reference.dynamic_map(signed))
    assert (ours[1:] > ours[:-1]).all()


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="format must be one of 'nf4', 'fp4', got 'nf5'"):
        qlora_native.codebook("nf5")
