"""Linear4bit and QLoRALinear: their numbers, gradients and dropout; autocast and compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layers import DOUBLE, DTYPES, KINDS, RTOL, assert_close, make_layer, want_of
from qlora_native import reference
from qlora_native.nn import QLoRALinear


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (5,), (2, 17), (0,)], ids=str)
def test_forward_is_the_references(kind, bias, dtype, leading):
    layer = make_layer(kind, bias=bias)
    x = torch.randn(*leading, 96).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*leading, 48)
    assert_close(y, want_of(layer, x), dtype)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@DOUBLE
def test_gradients_are_the_references(format, double_quant):
    layer = make_layer(QLoRALinear, format=format, double_quant=double_quant)
    x = torch.randn(7, 96, requires_grad=True)
    grad = torch.randn(7, 48)
    parameters = [x, layer.bias, layer.lora_A, layer.lora_B]
    got = torch.autograd.grad(layer(x), parameters, grad)
    want = torch.autograd.grad(want_of(layer, x), parameters, grad.double())
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


def test_training_dropout_is_a_function_of_the_seed_that_forward_draws():
    layer = make_layer(QLoRALinear, dropout=0.3)
    x = torch.randn(6, 96, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**62, (1,), dtype=torch.int64))
    w = layer.dequantize()
    want = reference.qlora_linear(
        x, w, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, 0.3, seed
    )
    assert_close(y, want)
    parameters = [x, layer.lora_A, layer.lora_B]
    got = torch.autograd.grad(y.sum(), parameters)
    for g, w in zip(got, torch.autograd.grad(want.sum(), parameters), strict=True):
        assert_close(g, w)


def test_dropout_is_off_in_eval_and_draws_nothing():
    layer = make_layer(QLoRALinear, dropout=0.3).eval()
    x = torch.randn(6, 96)
    before = torch.get_rng_state()
    assert_close(layer(x), want_of(layer, x))
    assert torch.equal(before, torch.get_rng_state())
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_train_evaluate_train_gradients_by_finite_differences():
    """An evaluation must not change what training computes, as it does in bitsandbytes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        make_layer(QLoRALinear, 24, 32), nn.Tanh(), make_layer(QLoRALinear, 8, 24)
    )
    x = torch.randn(5, 32)
    grad = torch.randn(5, 8)

    def loss(model):
        return (model(x) * grad).sum()

    def step():
        model.zero_grad()
        loss(model.train()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    before = step()
    with torch.no_grad():
        model.eval()(x)
    with torch.inference_mode():
        model(x[:1])
    after = step()
    for name in before:
        assert torch.equal(before[name], after[name]), name

    def reference_loss():
        h = torch.tanh(want_of(model[0], x))
        return (want_of(model[2], h) * grad).sum()

    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        eps = 1e-3
        with torch.no_grad():
            parameter += eps * direction
            up = reference_loss()
            parameter -= 2 * eps * direction
            down = reference_loss()
            parameter += eps * direction
        slope = (after[name] * direction).sum().item()
        assert slope == pytest.approx((up - down).item() / (2 * eps), rel=1e-2, abs=1e-3), name


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_nn_linears(kind, dtype):
    layer = make_layer(kind)
    x = torch.randn(3, 96)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert y.dtype == nn.Linear(96, 48)(x).dtype == dtype
        assert layer(torch.arange(96.0)[None].to(dtype)).dtype == dtype
    assert_close(y, want_of(layer, x), dtype)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_is_cast_to_the_inputs_dtype(x_dtype, bias_dtype):
    layer = make_layer(dtype=bias_dtype)
    x = torch.randn(3, 96).to(x_dtype)
    assert layer(x).dtype == x_dtype
    assert_close(layer(x), want_of(layer, x), max(x_dtype, bias_dtype, key=RTOL.get))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_whole_forward_and_backward(dropout):
    torch._dynamo.reset()
    model = nn.Sequential(
        make_layer(QLoRALinear, 32, 32, dropout=dropout), nn.GELU(), make_layer(QLoRALinear, 8, 32)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32)
    if dropout:
        assert torch.isfinite(compiled(x)).all()
        model.eval()
    y, want = compiled(x), model(x)
    assert_close(y, want)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(y.square().sum(), parameters)
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), parameters), strict=True):
        assert_close(g, w)
