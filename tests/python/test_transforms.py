"""The ops under torch's transforms: autocast, torch.func, forward-mode AD, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from cases import make_weight
from qlora_native import _autocast, autograd, ops
from qlora_native.nn import QLoRALinear

W = make_weight(24, 40)
CALL = torch.ops.qlora_native


def linear(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return autograd.linear_4bit(x, *W.tensors, W.out_features, W.blocksize, W.format, bias)


def qlora(x: Tensor, a: Tensor, b: Tensor, p: float = 0.0) -> Tensor:
    seed = torch.tensor([7]) if p else None
    return autograd.qlora_linear(x, *W.tensors, 64, "nf4", None, a, b, 0.5, p, seed)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 40)


@pytest.fixture
def lora() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 40), torch.randn(24, 4)


# ---- autocast ------------------------------------------------------------------------------------

LOWER = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOWER)
def test_autocast_casts_what_the_ops_multiply(
    dtype: torch.dtype, x: Tensor, lora: tuple[Tensor, Tensor]
) -> None:
    bias = torch.randn(24)
    low, low_bias = x.to(dtype), bias.to(dtype)
    wanted = ops.linear_4bit(low, *W.tensors, 24, bias=low_bias)
    wanted_qlora = ops.qlora_linear(low, *W.tensors, 64, "nf4", low_bias, *lora, 0.5)[0]
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(ops.linear_4bit(x, *W.tensors, 24, bias=bias), wanted)
        assert torch.equal(linear(x, bias), wanted)
        got = ops.qlora_linear(x, *W.tensors, 64, "nf4", bias, *lora, 0.5)[0]
        assert torch.equal(got, wanted_qlora)
        with torch.autocast("cpu", enabled=False):
            assert ops.linear_4bit(x, *W.tensors, 24).dtype == torch.float32
    assert wanted.dtype == wanted_qlora.dtype == dtype


@pytest.mark.parametrize("call", [linear, lambda x: ops.linear_4bit(x, *W.tensors, 24)])
def test_the_gradient_under_autocast_has_the_leafs_dtype(
    call: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(leaf)
    y.sum().backward()
    low = x.bfloat16().requires_grad_()
    call(low).sum().backward()
    assert leaf.grad is not None
    assert low.grad is not None
    assert torch.equal(leaf.grad, low.grad.float())


def test_autocast_leaves_float64_alone_as_torch_does(x: Tensor) -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="x must have dtype float32, float16 or bfloat16"),
    ):
        linear(x.double())


def test_the_rules_are_registered_for_cpu_and_cuda() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in _autocast.CAST:
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert has_kernel(f"qlora_native::{op}", key)


def test_the_table_of_what_is_cast_names_x_and_bias() -> None:
    for name, positions in _autocast.CAST.items():
        arguments = getattr(CALL, name).default._schema.arguments
        assert {arguments[i].name for i in positions} == {"x", "bias"} & {a.name for a in arguments}


# ---- torch.func ----------------------------------------------------------------------------------


def test_grad_and_vjp_are_autograds(x: Tensor, lora: tuple[Tensor, Tensor]) -> None:
    def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return qlora(x, a, b, 0.1).square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, *lora)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for got in (grad(loss, (0, 1, 2))(x, *lora), vjp(loss, x, *lora)[1](torch.tensor(1.0))):
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g, w)


def test_a_layer_is_called_with_other_parameters(x: Tensor) -> None:
    layer = QLoRALinear(40, 24, r=4)
    parameters = {name: torch.randn_like(p) for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    gradients = grad(loss)(parameters)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(parameters[name])
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(gradients[name], parameter.grad)


def test_the_jacobian_of_a_linear_is_its_weight(x: Tensor) -> None:
    torch.testing.assert_close(jacrev(linear)(x[0]), W.dequantize())


def test_grad_of_grad(x: Tensor) -> None:
    def half_norm(x: Tensor) -> Tensor:
        return grad(lambda x: linear(x).square().sum() / 2)(x).square().sum() / 2

    gram = W.dequantize().T @ W.dequantize()
    torch.testing.assert_close(grad(half_norm)(x), x @ gram @ gram, rtol=1e-4, atol=1e-4)


def test_the_second_derivative_of_qlora_linear_is_refused(
    x: Tensor, lora: tuple[Tensor, Tensor]
) -> None:
    def norm(x: Tensor) -> Tensor:
        return grad(lambda x: qlora(x, *lora).square().sum())(x).sum()

    with pytest.raises(RuntimeError, match="the second derivative is not implemented"):
        grad(norm)(x)


@pytest.mark.parametrize("call", [linear, lambda x: qlora(x, torch.ones(4, 40), torch.ones(24, 4))])
def test_forward_mode_is_refused_not_zero(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(call, (x,), (x,))
    with pytest.raises(NotImplementedError, match="jvp"):
        hessian(lambda x: call(x).square().sum())(x[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            call(dual)


# ---- vmap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_batch_of_activations_is_more_rows(dim: int, lora: tuple[Tensor, Tensor]) -> None:
    x = torch.randn(5, 3, 40).movedim(0, dim)
    rows = x.movedim(dim, 0)
    for call in (linear, lambda x: ops.linear_4bit(x, *W.tensors, 24), lambda x: qlora(x, *lora)):
        assert torch.equal(vmap(call, in_dims=dim)(x), call(rows))


def test_gradients_for_the_input_of_each_sample(x: Tensor) -> None:
    weighted = vmap(grad(lambda x: linear(x).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    linear(leaf).square().sum().backward()
    assert torch.equal(weighted, leaf.grad)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: qlora(torch.ones(3, 40), a, torch.ones(24, 4)),
        lambda a: grad(lambda a: qlora(torch.ones(3, 40), a, torch.ones(24, 4)).sum())(a),
        lambda a: qlora(a, torch.ones(4, 40), torch.ones(24, 4), 0.5),
        lambda a: ops.quantize_4bit(a),
        lambda a: ops.lion_step(
            [a], [a], [a], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0
        ),
    ],
    ids=["adapters", "their gradients", "dropout", "quantize", "an optimizer"],
)  # fmt: skip
def test_any_other_batch_is_refused(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"no batching rule for torch\.vmap.*in a loop"):
        vmap(call)(torch.randn(2, 4, 40))
