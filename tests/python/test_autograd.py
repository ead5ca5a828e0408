"""The gradients of the linear ops: through the ops, the eager path, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Weight, make_weight
from qlora_native import autograd, ops

R = 4
SCALE = 0.5
SEED = torch.tensor([1234])

Linear = Callable[..., Any]


def op_linear(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    return ops.linear_4bit(x, *w.tensors, w.out_features, w.blocksize, w.format, bias)


def eager_linear(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    return autograd.linear_4bit(x, *w.tensors, w.out_features, w.blocksize, w.format, bias)


def op_qlora(
    x: Tensor, w: Weight, bias: Tensor | None, a: Tensor, b: Tensor, p: float = 0.0
) -> Tensor:
    seed = SEED if p else None
    return ops.qlora_linear(x, *w.tensors, w.blocksize, w.format, bias, a, b, SCALE, p, seed)[0]


def eager_qlora(
    x: Tensor, w: Weight, bias: Tensor | None, a: Tensor, b: Tensor, p: float = 0.0
) -> Tensor:
    seed = SEED if p else None
    return autograd.qlora_linear(x, *w.tensors, w.blocksize, w.format, bias, a, b, SCALE, p, seed)


both_linear = pytest.mark.parametrize("linear", [op_linear, eager_linear])
both_qlora = pytest.mark.parametrize("qlora", [op_qlora, eager_qlora])


@pytest.fixture
def leaves() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 40), "bias": (24,), "a": (R, 40), "b": (24, R)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


W = make_weight(24, 40)


def close(got: Tensor | None, wanted: Tensor | None) -> None:
    assert got is not None
    assert wanted is not None
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@both_linear
def test_linear_4bit_has_the_gradients_of_the_dense_layer(
    linear: Linear, leaves: dict[str, Tensor]
) -> None:
    x, bias = leaves["x"], leaves["bias"]
    grad_out = torch.randn(2, 3, 24)
    got = torch.autograd.grad(linear(x, W, bias), (x, bias), grad_out)
    dense = torch.nn.functional.linear(x, W.dequantize(), bias)
    wanted = torch.autograd.grad(dense, (x, bias), grad_out)
    for g, w in zip(got, wanted, strict=True):
        close(g, w)


@both_qlora
def test_qlora_linear_has_the_gradients_of_the_dense_layers(
    qlora: Linear, leaves: dict[str, Tensor]
) -> None:
    x, bias, a, b = leaves.values()
    grad_out = torch.randn(2, 3, 24)
    got = torch.autograd.grad(qlora(x, W, bias, a, b), tuple(leaves.values()), grad_out)
    functional = torch.nn.functional
    dense = functional.linear(x, W.dequantize(), bias) + SCALE * functional.linear(
        functional.linear(x, a), b
    )
    wanted = torch.autograd.grad(dense, tuple(leaves.values()), grad_out)
    for g, w in zip(got, wanted, strict=True):
        close(g, w)


def test_both_paths_give_the_same_bits(leaves: dict[str, Tensor]) -> None:
    def gradients(qlora: Linear) -> list[Tensor]:
        x, bias, a, b = leaves.values()
        y = qlora(x, W, bias, a, b, 0.1)
        return [y, *torch.autograd.grad(y.square().sum(), tuple(leaves.values()))]

    for got, wanted in zip(gradients(op_qlora), gradients(eager_qlora), strict=True):
        assert torch.equal(got, wanted)


@both_qlora
@pytest.mark.parametrize("wanted", ["x", "bias", "a", "b"])
def test_only_what_is_asked_for_gets_a_gradient(
    qlora: Linear, wanted: str, leaves: dict[str, Tensor]
) -> None:
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    x, bias, a, b = leaves.values()
    qlora(x, W, bias, a, b).sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
    assert leaves[wanted].grad.shape == leaves[wanted].shape  # type: ignore[union-attr]


@both_linear
@both_qlora
def test_nothing_is_recorded_where_nothing_requires_it(
    linear: Linear, qlora: Linear, leaves: dict[str, Tensor]
) -> None:
    x, bias, a, b = (leaf.detach() for leaf in leaves.values())
    assert not linear(x, W, bias).requires_grad
    assert not qlora(x, W, bias, a, b).requires_grad
    with torch.no_grad():
        assert not linear(leaves["x"], W, leaves["bias"]).requires_grad
        assert not qlora(leaves["x"], W, None, leaves["a"], leaves["b"]).requires_grad


@both_linear
def test_linear_4bit_differentiates_twice(linear: Linear, leaves: dict[str, Tensor]) -> None:
    # d/dx of |grad_x|^2 / 2 for y = sum of f(x W^T), f = square: grad_x = 2 y W.
    x = leaves["x"]
    y = linear(x, W, None)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad_x.square().sum() / 2, x)
    dense = W.dequantize()
    gram = 2 * dense.t() @ dense
    close(second, x.detach() @ gram @ gram)


@both_qlora
def test_a_second_derivative_of_qlora_linear_is_refused(
    qlora: Linear, leaves: dict[str, Tensor]
) -> None:
    x, bias, a, b = leaves.values()
    y = qlora(x, W, bias, a, b)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the second derivative is not implemented"):
        grad_x.sum().backward()


def test_u_is_not_differentiable_and_says_so(leaves: dict[str, Tensor]) -> None:
    x, bias, a, b = leaves.values()
    y, u = ops.qlora_linear(x, *W.tensors, 64, "nf4", bias, a, b, SCALE)
    with pytest.raises(RuntimeError, match="u is not differentiable"):
        (y.sum() + u.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole_forward_and_backward(dtype: torch.dtype, leaves: dict[str, Tensor]) -> None:
    # The graph is traced whole and runs on the ops; what a code generator makes of the rest is not
    # ours, so the backend is the one that generates none.
    second = make_weight(40, 24, double_quant=False)

    def function(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(eager_qlora(x, W, bias, a, b, 0.1))
        return eager_linear(hidden, second, None).float().square().mean()

    x, bias, a, b = leaves.values()
    inputs = [x.detach().to(dtype), bias.detach().to(dtype), a.detach(), b.detach()]

    def run(f: Linear) -> list[Tensor]:
        args = [t.clone().requires_grad_() for t in inputs]
        loss = f(*args)
        return [loss, *torch.autograd.grad(loss, args)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled), run(function), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.slow
def test_compiles_with_the_default_backend(leaves: dict[str, Tensor]) -> None:
    x, bias, a, b = (leaf.detach() for leaf in leaves.values())
    a.requires_grad_()

    def function(x: Tensor, a: Tensor) -> Tensor:
        return torch.tanh(eager_qlora(x, W, bias, a, b)).sum()

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x, a), function(x, a))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, a), a), torch.autograd.grad(function(x, a), a)
    )


def test_compiles_with_dynamic_shapes(leaves: dict[str, Tensor]) -> None:
    _, bias, a, b = (leaf.detach() for leaf in leaves.values())
    compiled = torch.compile(
        lambda x: eager_qlora(x, W, bias, a, b), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (2, 5, 9):
        x = torch.randn(rows, 40, requires_grad=True)
        assert torch.equal(compiled(x), eager_qlora(x, W, bias, a, b))


def test_gradient_checkpointing_gives_the_same_bits(leaves: dict[str, Tensor]) -> None:
    x, bias, a, b = leaves.values()

    def layer(x: Tensor) -> Tensor:
        return eager_qlora(x, W, bias, a, b, 0.1)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), tuple(leaves.values()))

    recomputed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for got, wanted in zip(gradients(recomputed), gradients(layer(x)), strict=True):
        assert torch.equal(got, wanted)


HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def test_a_backward_pass_over_an_updated_parameter_is_refused() -> None:
    param = torch.ones(8, requires_grad=True)
    loss = param.square().sum()
    state = [torch.zeros(8)], [torch.zeros(8)]
    with torch.no_grad():
        ops.adamw_step([param], [torch.ones(8)], *state, **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_writing_into_an_output_is_counted() -> None:
    out = torch.zeros(3, 24)
    ops.linear_4bit_out(torch.randn(3, 40), *W.tensors, out)
    assert out._version == 1
    with torch.inference_mode():
        ops.linear_4bit_out(torch.randn(3, 40), *W.tensors, torch.zeros(3, 24))


def test_writing_into_an_output_has_no_gradient_and_says_so() -> None:
    x = torch.randn(3, 40, requires_grad=True)
    with pytest.raises(RuntimeError, match="linear_4bit_out is not differentiable, and x requires"):
        ops.linear_4bit_out(x, *W.tensors, torch.zeros(3, 24))
    with torch.no_grad():
        ops.linear_4bit_out(x, *W.tensors, torch.zeros(3, 24))
