"""The values that codes stand for: bitsandbytes' maps of 16 and of 256 entries.

The kernels know two 4-bit maps, NF4 and FP4, and the two dynamic 8-bit maps, signed and unsigned.
A tensor that is to be one of the latter is compared with it once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.bitsandbytes._missing import refuse

_KNOWN = "_qlora_native_map"  # attribute of a map that was compared: (its version, the answer)


def create_dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> Tensor:
    """The dynamic map (8-bit Approximations for Parallelism, section 3.2), float32 [256], sorted.

    An exponent e of max_exponent_bits puts 2^(bits that e leaves) fractions, the midpoints of equal
    parts of [0.1, 1], under 10^-e; 0 and 1 are added. Fewer than 8 bits are filled up with zeros.
    """
    fraction_bits = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]

    def add(exponent: int, parts: int) -> None:
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (exponent - max_exponent_bits + 1) * ((edges[:-1] + edges[1:]) / 2.0)
        values.extend(middles.tolist())
        if signed:
            values.extend((-middles).tolist())

    for exponent in range(max_exponent_bits):
        add(exponent, int(2 ** (exponent + fraction_bits + (not signed))))
    if fraction_bits > 0:
        add(max_exponent_bits - 1, 2**fraction_bits - 1)
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = 64
) -> Tensor:
    """The 16 values of "nf4" or "fp4" by code, float32, on `device` (CUDA if there is one)."""
    if typename not in ("nf4", "fp4"):
        refuse(f"4-bit type {typename!r}", "the kernels have 'nf4' and 'fp4'")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor(_core.codebook(typename), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=32)
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The kernels' own dynamic map on `device`; not to be written to."""
    code = torch.tensor(_core.dynamic_map(signed), dtype=torch.float32, device=device)
    return _remember(code, signed)


def sign_of(code: Tensor) -> bool | None:
    """Which dynamic map `code` is: True the signed, False the unsigned, None another one."""
    known: Any = getattr(code, _KNOWN, None)
    if known is not None and known[0] == code._version:
        return known[1]  # type: ignore[no-any-return]
    signed = None
    if code.dtype == torch.float32 and code.shape == (256,) and not code.is_meta:
        same = [s for s in (True, False) if torch.equal(code, dynamic_map(s, code.device))]
        signed = same[0] if same else None
    _remember(code, signed)
    return signed


def _remember(code: Tensor, signed: bool | None) -> Tensor:
    setattr(code, _KNOWN, (code._version, signed))
    return code
