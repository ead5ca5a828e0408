"""`matmul_4bit`, the product that bitsandbytes' 4-bit layers are made of."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

from qlora_native import autograd
from qlora_native.bitsandbytes._missing import LLM_INT8, missing_class, refuse
from qlora_native.bitsandbytes.functional import bytes_of, dequantize_4bit
from qlora_native.bitsandbytes.quant_state import QuantState

MatmulLtState = missing_class("MatmulLtState", __name__, LLM_INT8)


def matmul(*args: Any, **kwargs: Any) -> NoReturn:
    """The product of LLM.int8: not here."""
    refuse("matmul", LLM_INT8)


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A W^T + bias, W [N, K] read as 4-bit, never held as floats. Differentiable in A and bias.

    Args:
        A: [..., K], floating; under autocast it is cast to autocast's dtype.
        B, quant_state: quantize_4bit's of W.
        out: [..., N], filled and returned.
        bias: [N], cast to A's dtype.

    Returns:
        [..., N] of A's dtype; sums are accumulated in float32.
    """
    if quant_state is None:
        raise ValueError("quant_state must be given: quantize_4bit returns it")
    if len(quant_state.shape) != 2:
        raise ValueError(
            f"quant_state must be of a matrix [N, K], got shape {list(quant_state.shape)}"
        )
    kind = A.device.type
    if torch.is_autocast_enabled(kind) and A.is_floating_point():
        A = A.to(torch.get_autocast_dtype(kind))
    if bias is not None:
        bias = bias.to(A.dtype)
    N, K = quant_state.shape
    if A.shape[-1] == N != K:
        result = _product_of_transposed(A, B, quant_state, bias)
    else:
        result = autograd.linear_4bit(
            A,
            bytes_of(B),
            *quant_state.scales(),
            N,
            quant_state.blocksize,
            quant_state.quant_type,
            bias,
        )
    return result if out is None else out.copy_(result)


def _product_of_transposed(
    A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None
) -> Tensor:
    """A W + bias for a weight that was quantized as [in_features, out_features]."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"quant_state.shape {list(quant_state.shape)} is [in_features, out_features]: the "
            "weight is dequantized as a whole; quantize it as [out_features, in_features]",
            DeprecationWarning,
            stacklevel=3,
        )
    weight = dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
    return torch.nn.functional.linear(A, weight.t(), bias)
