"""qlora_linear and its gradients against float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear_cases import (
    CASES,
    DTYPE_IDS,
    DTYPES,
    NAMES,
    Weight,
    assert_as_exact_as_plain,
    make_weight,
    rand,
)
from qlora_native import ops, reference

# Small products: a second thread would only wait. The tests on threads set their own number.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.emulated]

SCALE = 1.75
SEED = torch.tensor([0x1234_5678_9ABC], dtype=torch.int64)


def adapters(n: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rand(r, k, seed=20, dtype=dtype, std=0.1), rand(n, r, seed=21, dtype=dtype, std=0.1)


def plain(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """What peft computes: the branch in the adapters' dtype, the base in x's; also u."""
    dropped = reference.dropout(x.float(), int(SEED), p).to(a.dtype) if p > 0 else x.to(a.dtype)
    u = dropped @ a.T
    y = x @ weight.rounded(x.dtype).T
    if bias is not None:
        y = y + bias
    return y + ((u @ b.T) * SCALE).to(x.dtype), u.float()


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_forward(isa: str, name: str, dtype: torch.dtype, p: float) -> None:
    case = CASES[name]
    weight = make_weight(case)
    bias = rand(case.n, seed=22, dtype=dtype)
    for m in case.m:
        for r in (1, 16) if m < 8 else (8, 19):
            x = rand(m, case.k, seed=23, dtype=dtype)
            a, b = adapters(case.n, case.k, r, torch.float32)
            y, u = ops.qlora_linear(
                x, *weight.parts, case.blocksize, case.format, bias, a, b, SCALE, p, SEED
            )
            exact = reference.qlora_linear(x, weight.exact, bias, a, b, SCALE, p, int(SEED))
            dropped = reference.dropout(x.double(), int(SEED), p) if p > 0 else x.double()
            exact_u = dropped @ a.double().T
            magnitude_u = dropped.abs() @ a.double().abs().T
            magnitude = (
                x.double().abs() @ weight.exact.abs().T
                + SCALE * magnitude_u @ b.double().abs().T
                + bias.double().abs()
            )
            plain_y, plain_u = plain(x, weight, bias, a, b, p)
            assert_as_exact_as_plain(u, plain_u, exact_u, magnitude_u, f"u, M={m}, R={r}")
            assert_as_exact_as_plain(y, plain_y, exact, magnitude, f"y, M={m}, R={r}")


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(isa: str, name: str, dtype: torch.dtype, p: float) -> None:
    case = CASES[name]
    weight = make_weight(case)
    for m in case.m:
        r = 5 if m < 8 else 16
        a, b = adapters(case.n, case.k, r, torch.float32)
        x = rand(m, case.k, seed=24, dtype=dtype)
        grad_out = rand(m, case.n, seed=25, dtype=dtype)
        bias = rand(case.n, seed=26, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (x, a, b, bias)]
        y, _ = ops.qlora_linear(
            leaves[0], *weight.parts, case.blocksize, case.format, leaves[3],
            leaves[1], leaves[2], SCALE, p, SEED,
        )  # fmt: skip
        actual = torch.autograd.grad(y, leaves, grad_out)

        leaves = [t.clone().requires_grad_() for t in (x, a, b, bias)]
        y, _ = plain(leaves[0], weight, leaves[3], leaves[1], leaves[2], p)
        simple = torch.autograd.grad(y, leaves, grad_out)

        leaves = [t.double().requires_grad_() for t in (x, a, b, bias)]
        exact_y = reference.qlora_linear(
            leaves[0], weight.exact, leaves[3], leaves[1], leaves[2], SCALE, p, int(SEED)
        )
        exact = torch.autograd.grad(exact_y, leaves, grad_out.double())

        # Sums of magnitudes: the same gradients of everything's absolute values.
        leaves = [t.double().abs().requires_grad_() for t in (x, a, b, bias)]
        magnitude_y = reference.qlora_linear(
            leaves[0], weight.exact.abs(), leaves[3], leaves[1], leaves[2], SCALE, p, int(SEED)
        )
        magnitude = torch.autograd.grad(magnitude_y, leaves, grad_out.double().abs())
        for what, got, ours_plain, want, size in zip(
            ("grad_x", "grad_a", "grad_b", "grad_bias"), actual, simple, exact, magnitude,
            strict=True,
        ):  # fmt: skip
            assert_as_exact_as_plain(got, ours_plain, want, size, f"{what}, M={m}")


@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=DTYPE_IDS)
def test_adapters_of_any_dtype(isa: str, adapter_dtype: torch.dtype) -> None:
    case = CASES["model"]
    weight = make_weight(case)
    a, b = adapters(case.n, case.k, 8, adapter_dtype)
    for m in (2, 20):
        leaves = [rand(m, case.k, seed=27).requires_grad_(), a.requires_grad_(), b.requires_grad_()]
        y, _ = ops.qlora_linear(
            leaves[0], *weight.parts, case.blocksize, case.format, None, leaves[1], leaves[2], SCALE
        )
        grad_out = rand(m, case.n, seed=28)
        grads = torch.autograd.grad(y, leaves, grad_out)
        exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
        exact = reference.qlora_linear(
            exact_leaves[0], weight.exact, None, exact_leaves[1], exact_leaves[2], SCALE
        )
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
        tolerance = max(torch.finfo(adapter_dtype).eps, 1e-5)
        for got, want, leaf in zip(
            grads, torch.autograd.grad(exact, exact_leaves, grad_out.double()), leaves, strict=True
        ):
            assert got.dtype == leaf.dtype
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-4)


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, step: float) -> Tensor:
    """d function / d at, element by element, by central differences."""
    grad = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = at.clone()
        moved.view(-1)[i] += step
        above = function(moved)
        moved.view(-1)[i] -= 2 * step
        grad.view(-1)[i] = (above - function(moved)) / (2 * step)
    return grad


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["no_dropout", "dropout"])
def test_gradients_by_finite_differences(isa: str, p: float) -> None:
    case = CASES["odd_everything"]
    weight = make_weight(case)
    m = 6
    x, grad_out = rand(m, case.k, seed=30), rand(m, case.n, seed=31)
    a, b = adapters(case.n, case.k, 3, torch.float32)
    inputs = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    y, _ = ops.qlora_linear(
        x, *weight.parts, case.blocksize, case.format, None, a, b, SCALE, p, SEED
    )
    grads = torch.autograd.grad(y, inputs, grad_out)
    exact = [t.detach().double() for t in inputs]
    for i, grad in enumerate(grads):

        def loss(moved: Tensor, i: int = i) -> Tensor:
            args = [moved if j == i else exact[j] for j in range(3)]
            y = reference.qlora_linear(
                args[0], weight.exact, None, args[1], args[2], SCALE, p, int(SEED)
            )
            return (y * grad_out.double()).sum()

        wanted = finite_difference(loss, exact[i], 1e-4)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", [1, 4, 40, 600])
def test_same_bits_on_any_number_of_threads(isa: str, m: int, dtype: torch.dtype) -> None:
    if isa == "cuda-emulated" and m > 16:
        pytest.skip("the plain way's product is torch's, whose bits on a CPU depend on threads")
    case = CASES["model"]
    weight = make_weight(case)
    a, b = adapters(case.n, case.k, 16, torch.float32)
    x, grad_out = rand(m, case.k, seed=32, dtype=dtype), rand(m, case.n, seed=33, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        y, u = ops.qlora_linear(
            x, *weight.parts, case.blocksize, case.format, None, a, b, SCALE, 0.1, SEED
        )
        grads = ops.qlora_linear_backward(
            grad_out, x, u, *weight.parts, case.blocksize, case.format, a, b, SCALE, 0.1, SEED,
            need_grad_bias=True,
        )  # fmt: skip
        results.append((y, u, *grads))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_only_what_is_needed_is_computed(isa: str) -> None:
    case = CASES["model"]
    weight = make_weight(case)
    a, b = adapters(case.n, case.k, 4, torch.float32)
    x, grad_out = rand(9, case.k, seed=34), rand(9, case.n, seed=35)
    _, u = ops.qlora_linear(x, *weight.parts, case.blocksize, case.format, None, a, b, SCALE)
    common = (grad_out, x, u, *weight.parts, case.blocksize, case.format, a, b, SCALE, 0.0, None)
    everything = ops.qlora_linear_backward(*common, need_grad_bias=True)
    for i in range(4):
        one = ops.qlora_linear_backward(*common, *(j == i for j in range(4)))
        assert torch.equal(one[i], everything[i])
        assert all(one[j].numel() == 0 for j in range(4) if j != i)


def test_zero_rank(isa: str) -> None:
    case = CASES["model"]
    weight = make_weight(case)
    a, b = adapters(case.n, case.k, 0, torch.float32)
    for m in (2, 12):
        x = rand(m, case.k, seed=36)
        y, u = ops.qlora_linear(x, *weight.parts, case.blocksize, case.format, None, a, b, SCALE)
        base = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format)
        assert u.shape == (m, 0)
        assert torch.equal(y, base)
