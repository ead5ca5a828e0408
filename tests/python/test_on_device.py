"""OnDevice, with the CPU as the device: what a test of a GPU relies on."""

from __future__ import annotations

import pytest
import torch

from on_device import OnDevice, Twins
from qlora_native import ops
from quantize_cases import same_bits


@pytest.mark.parametrize("offset", [0, 2, 6, 34])
def test_a_twin_is_the_same_view_as_misaligned(sentinels, offset: int) -> None:
    tensor = sentinels((6, 5), torch.float16, offset=offset)
    tensor.copy_(torch.arange(30.0).view(6, 5))
    view = tensor.t()[1:]
    twin = Twins("cpu").of(view)
    assert twin.data_ptr() != view.data_ptr()
    assert twin.data_ptr() % 64 == view.data_ptr() % 64
    assert twin.stride() == view.stride() and torch.equal(twin, view)


def test_views_of_one_storage_have_twins_in_one(sentinels) -> None:
    buffer = torch.zeros(100)
    twins = Twins("cpu")
    first, second = twins.of(buffer[10:20]), twins.of(buffer[15:30])
    assert second.data_ptr() - first.data_ptr() == 5 * 4


def test_what_was_written_past_an_end_comes_back() -> None:
    buffer = torch.zeros(100)
    inner = buffer[10:20]
    twins = Twins("cpu")
    past = twins.of(inner).as_strided((12,), (1,))
    past.fill_(7.0)
    twins.bring_back(inner)
    assert buffer[9] == 0 and (buffer[10:22] == 7).all() and buffer[22] == 0


def test_nothing_has_a_twin() -> None:
    twins = Twins("cpu")
    assert twins.of(torch.empty(0, 5)).shape == (0, 5)
    twins.bring_back(torch.empty(0))


class _Counted(OnDevice):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _Counted.calls += func.namespace == "qlora_native"
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_ops_answer_as_without_it(sentinels) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, absmax = ops.quantize_4bit(x)
    tokens = torch.randn(3, 96).requires_grad_()
    y = ops.linear_4bit(tokens, packed, absmax, None, None, 64)
    (grad,) = torch.autograd.grad(y.sum(), tokens)
    param = torch.ones(300)
    lists = [[param], [torch.ones(300)], [torch.zeros(300)], [torch.zeros(300)]]
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    with _Counted("cpu"):
        out = sentinels(packed.shape, torch.uint8), sentinels(absmax.shape)
        ops.quantize_4bit_out(x, *out)
        again = ops.linear_4bit(tokens, packed, absmax, None, None, 64)
        (grad_again,) = torch.autograd.grad(again.sum(), tokens)
        ops.adamw_step(*lists, **hyper)
    assert _Counted.calls == 4
    assert same_bits(out[0], packed) and same_bits(out[1], absmax)
    assert torch.equal(again, y) and torch.equal(grad_again, grad)
    assert (param < 1).all()


def test_errors_come_through() -> None:
    with OnDevice("cpu"), pytest.raises(ValueError, match="blocksize"):
        ops.quantize_4bit(torch.zeros(64), 63)
