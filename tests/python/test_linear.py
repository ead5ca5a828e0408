"""linear_4bit and its input gradient against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from linear_cases import (
    CASES,
    DTYPE_IDS,
    DTYPES,
    NAMES,
    Case,
    assert_backward_input,
    assert_forward,
    make_weight,
    rand,
)
from qlora_native import ops

# Small products: a second thread would only wait. The tests on threads set their own number.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.emulated]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_forward(isa: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    weight = make_weight(case)
    bias = rand(case.n, seed=1, dtype=dtype)
    for m in case.m:
        x = rand(m, case.k, seed=2, dtype=dtype)
        y = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format)
        assert_forward(y, x, weight, None, f"M={m}")
        y = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format, bias)
        assert_forward(y, x, weight, bias, f"M={m} with bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_few_rows_at_every_blocksize(isa: str, blocksize: int, dtype: torch.dtype) -> None:
    """Rows that are whole blocks, and rows of half a block (as far as those go)."""
    for k in (blocksize, blocksize // 2, 3 * blocksize):
        case = Case(n=9, k=k, m=(1, 3, 6), blocksize=blocksize)
        weight = make_weight(case)
        for m in case.m:
            x = rand(m, k, seed=12, dtype=dtype)
            assert_forward(
                ops.linear_4bit(x, *weight.parts, case.n, blocksize, case.format),
                x,
                weight,
                None,
                f"K={k}, M={m}",
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_backward_input(isa: str, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    weight = make_weight(case)
    for m in case.m:
        grad_out = rand(m, case.n, seed=3, dtype=dtype)
        grad_x = ops.linear_4bit_backward_input(
            grad_out, *weight.parts, case.k, case.blocksize, case.format
        )
        assert_backward_input(grad_x, grad_out, weight, f"M={m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_writes_only_its_output(isa: str, sentinels, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    weight = make_weight(case)
    for m in case.m:
        x = rand(m, case.k, seed=4, dtype=dtype)
        out = sentinels((m, case.n), dtype)
        ops.linear_4bit_out(x, *weight.parts, out, case.blocksize, case.format)
        again = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format)
        assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_reads_only_its_inputs(isa: str, sentinels, name: str, dtype: torch.dtype) -> None:
    """Inputs between NaN margins: a read past an end that reached the result would show."""
    case = CASES[name]
    weight = make_weight(case)
    expected_at = {}
    for m in case.m:
        x = rand(m, case.k, seed=5, dtype=dtype)
        expected_at[m] = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format)
    parts = []
    for part in weight.parts:
        if part is None:
            parts.append(None)
            continue
        margins = torch.full((part.numel() + 256,), 255).to(part.dtype)
        if part.is_floating_point():
            margins.fill_(float("nan"))
        inner = margins[128 : 128 + part.numel()].view(part.shape)
        parts.append(inner.copy_(part))
    for m in case.m:
        buffer = torch.full((m * case.k + 256,), float("nan"), dtype=dtype)
        x = buffer[128 : 128 + m * case.k].view(m, case.k)
        x.copy_(rand(m, case.k, seed=5, dtype=dtype))
        y = ops.linear_4bit(x, *parts, case.n, case.blocksize, case.format)
        assert torch.equal(y, expected_at[m])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", [1, 2, 4, 5, 8, 9, 40, 600])
def test_same_bits_on_any_number_of_threads(isa: str, m: int, dtype: torch.dtype) -> None:
    if isa == "cuda-emulated" and m > 16:
        pytest.skip("the plain way's product is torch's, whose bits on a CPU depend on threads")
    case = CASES["model"]
    weight = make_weight(case)
    x, grad_out = rand(m, case.k, seed=6, dtype=dtype), rand(m, case.n, seed=7, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format),
                ops.linear_4bit_backward_input(
                    grad_out, *weight.parts, case.k, case.blocksize, case.format
                ),
            )
        )
    torch.set_num_threads(before)
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])


@pytest.mark.parametrize("m", [1, 5])
def test_infinity_and_nan_stay_in_their_row(isa: str, m: int) -> None:
    case = CASES["model"]
    weight = make_weight(case)
    x = rand(m, case.k, seed=8)
    clean = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format)
    x[m - 1, 3] = float("nan")
    y = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format)
    assert torch.isnan(y[m - 1]).all()
    assert torch.equal(y[: m - 1], clean[: m - 1])


def test_gradients_through_autograd(isa: str) -> None:
    case = CASES["model"]
    weight = make_weight(case)
    x = rand(2, 9, case.k, seed=9).requires_grad_()
    bias = rand(case.n, seed=10).requires_grad_()
    grad_out = rand(2, 9, case.n, seed=11)
    y = ops.linear_4bit(x, *weight.parts, case.n, case.blocksize, case.format, bias)
    y.backward(grad_out)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(
        x.grad.double(), grad_out.double() @ weight.exact, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(bias.grad, grad_out.sum((0, 1)), rtol=1e-5, atol=1e-5)
