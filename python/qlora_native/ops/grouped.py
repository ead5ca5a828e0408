"""The linear layer of a mixture of experts: each group of rows has a 4-bit matrix of its own.

A stack of G matrices [N, K] is quantized as one tensor [G, N, K] and travels as a weight does.
Where G is above 1, each matrix must begin with a block: blocksize divides N * K. Where scales are
double-quantized and N * K / blocksize is no multiple of 256, a call dequantizes the scales before
the product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qlora_native import _load as _load
from qlora_native._errors import python_errors

_ops: Any = torch.ops.qlora_native
_grouped_linear_4bit = _ops.grouped_linear_4bit.default
_grouped_linear_4bit_backward_input = _ops.grouped_linear_4bit_backward_input.default


@python_errors
def grouped_linear_4bit(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int = 64,
    format: str = "nf4",
) -> Tensor:
    """y[rows of g] = x[rows of g] W[g]^T for every group g. Differentiable in x.

    Args:
        x: [M, K], floating; the rows of a group stand together, in the groups' order.
        offsets: int32 [G]: group g is the rows offsets[g-1] (0 for the first) to offsets[g], as in
            torch.nn.functional.grouped_mm; the last is M. A group may be empty. On a GPU, reading
            them waits for it.
        packed, absmax, nested_absmax, nested_offset: of the stack [G, N, K].
        out_features: N.

    Returns:
        [M, N], of x's dtype; sums are accumulated in float32.
    """
    return cast(
        Tensor,
        _grouped_linear_4bit(
            x, offsets, packed, absmax, nested_absmax, nested_offset, out_features, blocksize,
            format,
        ),
    )  # fmt: skip


@python_errors
def grouped_linear_4bit_backward_input(
    grad_out: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int = 64,
    format: str = "nf4",
) -> Tensor:
    """grad_x[rows of g] = grad_out[rows of g] W[g], the gradient of grouped_linear_4bit.

    Args:
        grad_out: [M, N], floating.
        offsets: int32 [G], as grouped_linear_4bit has them.
        in_features: K.

    Returns:
        [M, K], of grad_out's dtype.
    """
    return cast(
        Tensor,
        _grouped_linear_4bit_backward_input(
            grad_out, offsets, packed, absmax, nested_absmax, nested_offset, in_features, blocksize,
            format,
        ),
    )  # fmt: skip
