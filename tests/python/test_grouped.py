"""grouped_linear_4bit and its input gradient against float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from linear_cases import (
    DTYPE_IDS,
    DTYPES,
    Case,
    Weight,
    assert_backward_input,
    assert_forward,
    make_weight,
    rand,
)
from qlora_native import autograd, ops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.emulated]


@dataclass(frozen=True)
class Stack:
    """`groups` matrices [n, k]; `rows` of x for each."""

    n: int
    k: int
    rows: tuple[int, ...]
    blocksize: int = 64
    format: str = "nf4"
    double_quant: bool = True

    @property
    def case(self) -> Case:
        """The stack as one weight."""
        groups = len(self.rows)
        return Case(groups * self.n, self.k, (), self.blocksize, self.format, self.double_quant)

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(self.rows).cumsum(0).to(torch.int32)


STACKS = {
    "nested blocks of their own": Stack(n=64, k=256, rows=(3, 0, 17, 1)),
    "a nested block for all": Stack(n=24, k=64, rows=(1, 5, 0, 2)),
    "single-quantized": Stack(n=16, k=96, rows=(2, 9), blocksize=128, double_quant=False),
    "fp4": Stack(n=8, k=320, rows=(1, 1, 6), format="fp4"),
    "odd k": Stack(n=32, k=77, rows=(4, 3, 2), blocksize=32),
    "no rows at all": Stack(n=24, k=64, rows=(0, 0)),
    "one matrix, odd everything": Stack(n=7, k=5, rows=(3,)),
}


def matrices(stack: Stack, weight: Weight) -> Iterator[tuple[slice, Weight]]:
    """Rows of x, and the matrix that they meet."""
    begin = 0
    for group, rows in enumerate(stack.rows):
        exact = weight.exact[group * stack.n : (group + 1) * stack.n]
        yield slice(begin, begin + rows), replace(weight, exact=exact)
        begin += rows


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", STACKS)
def test_forward(isa: str, name: str, dtype: torch.dtype) -> None:
    stack = STACKS[name]
    weight = make_weight(stack.case)
    x = rand(sum(stack.rows), stack.k, seed=2, dtype=dtype)
    y = ops.grouped_linear_4bit(
        x, stack.offsets, *weight.parts, stack.n, stack.blocksize, stack.format
    )
    assert y.shape == (x.shape[0], stack.n)
    for rows, matrix in matrices(stack, weight):
        assert_forward(y[rows], x[rows], matrix, None, str(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", STACKS)
def test_backward_input(isa: str, name: str, dtype: torch.dtype) -> None:
    stack = STACKS[name]
    weight = make_weight(stack.case)
    grad_out = rand(sum(stack.rows), stack.n, seed=3, dtype=dtype)
    grad_x = ops.grouped_linear_4bit_backward_input(
        grad_out, stack.offsets, *weight.parts, stack.k, stack.blocksize, stack.format
    )
    assert grad_x.shape == (grad_out.shape[0], stack.k)
    for rows, matrix in matrices(stack, weight):
        assert_backward_input(grad_x[rows], grad_out[rows], matrix, str(rows))


@pytest.mark.parametrize("call", [ops.grouped_linear_4bit, autograd.grouped_linear_4bit])
def test_gradients_are_those_of_the_matrices(call) -> None:
    stack = STACKS["a nested block for all"]
    weight = make_weight(stack.case)
    x = rand(sum(stack.rows), stack.k, seed=4).requires_grad_()
    y = call(x, stack.offsets, *weight.parts, stack.n)
    (grad_x,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad(grad_x.square().sum() / 2, x)
    for rows, matrix in matrices(stack, weight):
        gram = (matrix.exact.T @ matrix.exact).float()
        torch.testing.assert_close(grad_x[rows], x[rows] @ gram, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second[rows], x[rows] @ gram @ gram, rtol=1e-4, atol=1e-5)


def test_a_transform_differentiates_it() -> None:
    stack = STACKS["a nested block for all"]
    weight = make_weight(stack.case)
    x = rand(sum(stack.rows), stack.k, seed=4)

    def loss(x: Tensor) -> Tensor:
        y = autograd.grouped_linear_4bit(x, stack.offsets, *weight.parts, stack.n)
        return y.square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(x), leaf.grad)
