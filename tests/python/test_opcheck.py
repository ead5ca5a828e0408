"""torch.library.opcheck on every op: schema, gradient registration, fake kernel, AOT dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import make_weight
from qlora_native import ops

Case = tuple[tuple[Any, ...], dict[str, Any]]


def case(*args: Any, **kwargs: Any) -> Case:
    return args, kwargs


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def quantized_4bit() -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_4bit(randn(5, 33))


def quantized_8bit() -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_8bit(randn(5, 33))


W = make_weight(24, 40)
PLAIN = make_weight(24, 40, double_quant=False)
STACK = make_weight(3 * 8, 40)  # three matrices of [8, 40]
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
SEED = torch.tensor([1234])


def lora(grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(4, 40, grad=grad), randn(24, 4, grad=grad)


def bytes_of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


# op.overload -> calls of it
CASES: dict[str, Callable[[], list[Case]]] = {
    "quantize_4bit.default": lambda: [
        case(randn(5, 33), 64, "nf4"),
        case(randn(0), 64, "fp4"),
        case(randn(33, 5, dtype=torch.bfloat16).t(), 32, "fp4"),
    ],
    "quantize_4bit.out": lambda: [
        case(randn(5, 33), 64, "nf4", packed=bytes_of(83), absmax=torch.zeros(3)),
    ],
    "dequantize_4bit.default": lambda: [
        case(*quantized_4bit(), None, None, [5, 33], 64, "nf4", torch.bfloat16),
        case(*W.tensors, [24, 40], 64, "nf4", torch.float32),
    ],
    "dequantize_4bit.out": lambda: [
        case(*quantized_4bit(), None, None, 64, "nf4", out=torch.zeros(5, 33)),
        case(*W.tensors, 64, "nf4", out=torch.zeros(24, 40, dtype=torch.float16)),
    ],
    "quantize_8bit.default": lambda: [
        case(randn(5, 333), 256, True, "nearest"),
        case(randn(7).abs(), 256, False, "bitsandbytes_cpu"),
    ],
    "quantize_8bit.out": lambda: [
        case(randn(300), 256, True, "nearest", codes=bytes_of(300), absmax=torch.zeros(2)),
    ],
    "dequantize_8bit.default": lambda: [case(*quantized_8bit(), 256, True, torch.float16)],
    "dequantize_8bit.out": lambda: [case(*quantized_8bit(), 256, True, out=torch.zeros(5, 33))],
    "quantize_scales.default": lambda: [
        case(randn(300).abs(), "nearest", None),
        case(randn(3).abs(), "nearest", torch.tensor([0.5])),
    ],
    "dequantize_scales.default": lambda: [
        case(*ops.quantize_scales(randn(300).abs())),
    ],
    "linear_4bit.default": lambda: [
        case(randn(2, 3, 40, grad=True), *W.tensors, 24, 64, "nf4", randn(24, grad=True)),
        case(randn(40, grad=True), *PLAIN.tensors, 24, 64, "nf4", None),
        case(randn(0, 40, grad=True), *W.tensors, 24, 64, "nf4", None),
    ],
    "linear_4bit.out": lambda: [
        case(randn(3, 40), *W.tensors, 64, "nf4", None, out=torch.zeros(3, 24)),
    ],
    "linear_4bit_backward_input.default": lambda: [
        case(randn(2, 3, 24, grad=True), *W.tensors, 40, 64, "nf4"),
    ],
    "qlora_linear.default": lambda: [
        case(
            randn(2, 3, 40, grad=True), *W.tensors, 64, "nf4", randn(24, grad=True), *lora(), 0.5,
            0.1, SEED,
        ),
        case(randn(3, 40), *PLAIN.tensors, 64, "nf4", None, *lora(grad=False), 2.0, 0.0, None),
    ],
    "qlora_linear_backward.default": lambda: [
        case(
            randn(3, 24), randn(3, 40), randn(3, 4), *W.tensors, 64, "nf4", *lora(grad=False), 0.5,
            0.1, SEED, True, True, True, True,
        ),
        case(
            randn(3, 24), randn(3, 40), randn(3, 4), *W.tensors, 64, "nf4", *lora(grad=False), 0.5,
            0.0, None, False, True, False, False,
        ),
    ],
    "grouped_linear_4bit.default": lambda: [
        case(randn(5, 40, grad=True), OFFSETS, *STACK.tensors, 8, 64, "nf4"),
        case(randn(5, 40), OFFSETS, *PLAIN.tensors, 8, 64, "nf4"),
    ],
    "grouped_linear_4bit_backward_input.default": lambda: [
        case(randn(5, 8, grad=True), OFFSETS, *STACK.tensors, 40, 64, "nf4"),
    ],
    "adamw_step.default": lambda: [
        case(
            [randn(40), randn(3, 5)], [randn(40), randn(3, 5)], [randn(40), randn(3, 5)],
            [randn(40).abs(), randn(3, 5).abs()], 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, False, None,
            None,
        ),
    ],
    "adamw_8bit_step.default": lambda: [
        case(
            [randn(300)], [randn(300)], [bytes_of(300)], [bytes_of(300)], [torch.ones(2)],
            [torch.ones(2)], 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, True, torch.tensor([2.0]),
            torch.tensor([0.0]),
        ),
    ],
    "lion_step.default": lambda: [
        case(
            [randn(40), randn(3, 5)], [randn(40), randn(3, 5)], [randn(40), randn(3, 5)],
            1e-4, 0.9, 0.99, 0.01, False, None, None,
        ),
    ],
    "lion_8bit_step.default": lambda: [
        case(
            [randn(300)], [randn(300)], [bytes_of(300)], [torch.ones(2)], 1e-4, 0.9, 0.99, 0.01,
            True, torch.tensor([2.0]), torch.tensor([0.0]),
        ),
    ],
    "sgd_step.default": lambda: [
        case(
            [randn(40), randn(3, 5)], [randn(40), randn(3, 5)], [randn(40), randn(3, 5)],
            1e-2, 0.9, 0.0, 0.01, True, True, False, None, None,
        ),
    ],
    "sgd_8bit_step.default": lambda: [
        case(
            [randn(300)], [randn(300)], [bytes_of(300)], [torch.ones(2)], 1e-2, 0.9, 0.1, 0.01,
            False, False, True, torch.tensor([2.0]), torch.tensor([0.0]),
        ),
    ],
}  # fmt: skip

# The AOT test sums all outputs into a loss, and u of qlora_linear refuses a gradient. The compiled
# gradients are tested in test_autograd.py.
WITHOUT_AOT = ("test_schema", "test_autograd_registration", "test_faketensor")


def requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def all_ops() -> list[str]:
    namespace = torch.ops.qlora_native
    names = torch._C._dispatch_get_all_op_names()
    found = []
    for name in names:
        if name.startswith("qlora_native::"):
            op, _, overload = name.removeprefix("qlora_native::").partition(".")
            assert hasattr(namespace, op)
            found.append(f"{op}.{overload or 'default'}")
    return sorted(found)


def test_every_op_has_a_case() -> None:
    assert sorted(CASES) == all_ops()


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    op_name, overload = name.split(".")
    op = getattr(getattr(torch.ops.qlora_native, op_name), overload)
    for args, kwargs in CASES[name]():
        without_aot = name == "qlora_linear.default" and requires_grad(args)
        utils = WITHOUT_AOT if without_aot else "ALL"
        torch.library.opcheck(op, args, kwargs, test_utils=utils)
