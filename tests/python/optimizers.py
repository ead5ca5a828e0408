"""Parameters, gradients and steps for the tests of optimizers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from qlora_native.optim import SGD, AdamW, AdamW8bit, Lion, Lion8bit, SGD8bit
from qlora_native.optim.native import NativeOptimizer

ALL = [AdamW, AdamW8bit, Lion, Lion8bit, SGD, SGD8bit]
each = pytest.mark.parametrize("make", ALL)
Make = type[NativeOptimizer]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix of more than 4096 values, a small vector, and an empty one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(80, 70), (33,), (0, 5)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def assert_equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through_disk(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
