"""The LoRA branch's dropout: a mask that is a function of seed, row and column alone.

Seen through the ops: with A the identity, u = drop(x) shows the mask of the forward pass, and
grad_a = g^T drop(x) that of the backward pass.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qlora_native
from linear_cases import CASES, Case, make_weight, rand
from qlora_native import ops, reference

K = 48
WEIGHT_CASE = Case(n=K, k=K, m=(), double_quant=False)


def seed_tensor(seed: int) -> Tensor:
    return torch.tensor([seed], dtype=torch.int64)


def dropped(x: Tensor, seed: int, p: float) -> Tensor:
    """drop(x) as the forward op has it."""
    weight = make_weight(WEIGHT_CASE)
    identity = torch.eye(K)
    _, u = ops.qlora_linear(
        x, *weight.parts, 64, "nf4", None, identity, identity, 1.0, p, seed_tensor(seed)
    )
    return u


@pytest.mark.parametrize("m", [1, 4, 5, 70])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62, -(2**63)])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999])
def test_mask_is_the_definition(isa: str, m: int, seed: int, p: float) -> None:
    x = torch.ones(m, K)
    expected = reference.dropout(x, seed, p)
    assert torch.equal(dropped(x, seed, p), expected)


@pytest.mark.parametrize("m", [1, 2, 5, 64])
def test_backward_has_the_forward_mask(isa: str, m: int) -> None:
    weight = make_weight(WEIGHT_CASE)
    identity, seed, p = torch.eye(K), seed_tensor(77), 0.3
    x = rand(m, K, seed=1)
    _, u = ops.qlora_linear(x, *weight.parts, 64, "nf4", None, identity, identity, 1.0, p, seed)
    # B = I, scale = 1: g = grad_out, and row i of g^T drop(x) is row i of drop(x) for grad_out = I.
    grad_out = torch.eye(m, K)
    _, grad_a, _, _ = ops.qlora_linear_backward(
        grad_out, x, u, *weight.parts, 64, "nf4", identity, identity, 1.0, p, seed
    )
    rows = min(m, K)
    assert torch.equal(grad_a[:rows], u[:rows])


@pytest.mark.parametrize("m", [1, 5, 64])
def test_input_gradient_is_masked_alike(isa: str, m: int) -> None:
    case = WEIGHT_CASE
    weight = make_weight(case)
    packed_zero = torch.full_like(weight.packed, 0x77)  # NF4's code 7 is zero: the branch alone
    identity, seed, p = torch.eye(K), seed_tensor(78), 0.4
    ones = torch.ones(m, K)
    parts = (packed_zero, *weight.parts[1:])
    _, u = ops.qlora_linear(ones, *parts, 64, "nf4", None, identity, identity, 1.0, p, seed)
    grad_x, _, _, _ = ops.qlora_linear_backward(
        ones, ones, u, *parts, 64, "nf4", identity, identity, 1.0, p, seed
    )
    assert torch.equal(grad_x, u)


def test_same_mask_on_every_instruction_set() -> None:
    masks = []
    before = qlora_native.cpu_isa()
    for name in qlora_native.available_isas():
        qlora_native.force_isa(name)
        masks.append(dropped(torch.ones(33, K), 5, 0.37))
    qlora_native.force_isa(before)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_kept_and_gain(p: float) -> None:
    rows, trials = 400, 10
    kept = torch.stack([dropped(torch.ones(rows, K), seed, p) for seed in range(trials)])
    n = kept.numel()
    share = (kept != 0).double().mean()
    assert abs(float(share) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)))


def test_elements_rows_and_seeds_are_independent() -> None:
    n, p = 4096, 0.5
    a = reference.dropout_mask(1, n // K, K, p).double() - 0.5
    b = reference.dropout_mask(2, n // K, K, p).double() - 0.5
    limit = 5 * 0.25 / math.sqrt(n)
    assert abs(float((a * b).mean())) < limit
    assert abs(float((a[1:] * a[:-1]).mean())) < limit
    assert abs(float((a[:, 1:] * a[:, :-1]).mean())) < limit


@pytest.mark.parametrize("m", [3, 20])
def test_zero_probability_is_no_dropout(isa: str, m: int) -> None:
    case = CASES["model"]
    weight = make_weight(case)
    x = rand(m, case.k, seed=2)
    a, b = rand(8, case.k, seed=3), rand(case.n, 8, seed=4)
    args = (x, *weight.parts, case.blocksize, case.format, None, a, b, 0.5)
    without = ops.qlora_linear(*args)
    zero = ops.qlora_linear(*args, 0.0, seed_tensor(9))
    assert all(torch.equal(one, other) for one, other in zip(without, zero, strict=True))
