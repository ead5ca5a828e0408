"""lion_step, sgd_step and their 8-bit forms, against their formulas in fp32 to the bit.

The kernels do what cpp/cpu/lion_inl.h and sgd_inl.h write down, each operation rounded once and in
that order, and numpy rounds likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import Sentinels
from moments_8bit import BLOCKSIZE, decode, encode
from qlora_native import ops, reference

pytestmark = pytest.mark.emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
sizes = pytest.mark.parametrize("n", [0, 1, 3, 77, 255, 256, 257, 4227, 40_001])

F = np.float32
Array = np.ndarray[Any, Any]
# (p, g, m, settings) -> the new p and m
Formula = Callable[[Array, Array, Array, dict[str, Any]], tuple[Array, Array]]


def lion(p: Array, g: Array, m: Array, h: dict[str, Any]) -> tuple[Array, Array]:
    direction = F(h["beta1"]) * m + F(1 - h["beta1"]) * g
    new_m = F(h["beta2"]) * m + F(1 - h["beta2"]) * g
    sign = (direction > 0).astype(F) - (direction < 0).astype(F)
    return p * F(1 - h["lr"] * h["weight_decay"]) - F(h["lr"]) * sign, new_m


def sgd(p: Array, g: Array, m: Array, h: dict[str, Any]) -> tuple[Array, Array]:
    g = g + F(h["weight_decay"]) * p
    new_m = g if h["first_step"] else F(h["momentum"]) * m + F(1 - h["dampening"]) * g
    direction = g + F(h["momentum"]) * new_m if h["nesterov"] else new_m
    return p - F(h["lr"]) * direction, new_m


@dataclass(frozen=True)
class Rule:
    formula: Formula
    op: Callable[..., None]
    op_8bit: Callable[..., None]
    settings: dict[str, Any]


LION = Rule(
    lion,
    ops.lion_step,
    ops.lion_8bit_step,
    {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
)
SGD = Rule(
    sgd,
    ops.sgd_step,
    ops.sgd_8bit_step,
    {
        "lr": 1e-2,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.01,
        "nesterov": False,
        "first_step": False,
    },
)
rules = pytest.mark.parametrize("rule", [LION, SGD], ids=["lion", "sgd"])
CHANGES = [
    *((LION, change) for change in ({"weight_decay": 0.0}, {"beta1": 0.0}, {"beta2": 0.0})),
    *(
        (SGD, change)
        for change in (
            {"weight_decay": 0.0},
            {"nesterov": True},
            {"dampening": 0.3},
            {"first_step": True, "dampening": 0.3},
        )
    ),
]


def values(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Magnitudes over six decades, as gradients have them, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    decades = torch.rand(n, generator=generator) * 6 - 6
    x = torch.randn(n, generator=generator) * 10**decades
    x[::17] = 0
    return x.to(dtype)


def by_formula(
    rule: Rule, p: Tensor, g: Tensor, m: Tensor, settings: dict[str, Any], maximize: bool = False
) -> tuple[Tensor, Tensor]:
    p_np, g_np, m_np = (t.to(torch.float32).numpy() for t in (p, g, m))
    with np.errstate(all="ignore"):
        p_np, m_np = rule.formula(p_np, F(0) - g_np if maximize else g_np, m_np, settings)
    return torch.from_numpy(p_np).to(p.dtype), torch.from_numpy(m_np)


def by_formula_8bit(
    rule: Rule, p: Tensor, g: Tensor, codes: Tensor, absmax: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    old = decode(codes, absmax, signed=True)
    new_p, m = by_formula(rule, p, g, old, settings)
    kept = ~m.isfinite()
    codes, absmax = encode(torch.where(kept, old, m), signed=True)
    return torch.where(kept, p, new_p), codes, absmax


def assert_same_bits(got: Tensor, wanted: Tensor, name: str) -> None:
    where = (got.nan_to_num(nan=12345.0) != wanted.nan_to_num(nan=12345.0)).nonzero()
    assert where.numel() == 0, f"{name} differs at {where[:5].flatten().tolist()}"


@rules
@sizes
@dtypes
def test_32bit_is_the_formula_to_the_bit(isa: str, rule: Rule, n: int, dtype: torch.dtype) -> None:
    p, m = values(n, dtype, seed=1), torch.zeros(n)
    for step in range(3):
        g = values(n, dtype, seed=10 + step)
        wanted = by_formula(rule, p, g, m, rule.settings)
        rule.op([p], [g], [m], **rule.settings)
        assert_same_bits(p, wanted[0], "param")
        assert_same_bits(m, wanted[1], "moment")


@pytest.mark.parametrize("nesterov", [False, True])
def test_is_near_the_reference(isa: str, nesterov: bool) -> None:
    """Against float64: a few roundings of fp32 a step, of values of size 1."""
    p, g, m = (torch.randn(1000, generator=torch.Generator().manual_seed(s)) for s in range(3))
    settings = {**SGD.settings, "nesterov": nesterov}
    del settings["first_step"]
    wanted = reference.sgd(p, g, m, **settings)
    wanted_lion = reference.lion(p, g, m, **LION.settings)
    p_lion, m_lion = p.clone(), m.clone()
    ops.sgd_step([p], [g], [m], **settings, first_step=False)
    ops.lion_step([p_lion], [g], [m_lion], **LION.settings)
    for got, want in zip((p, m, p_lion, m_lion), (*wanted, *wanted_lion), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=4 * 2**-24, atol=4 * 2**-24)


@rules
@sizes
@dtypes
def test_8bit_is_the_same_algorithm_written_in_torch(
    isa: str, rule: Rule, n: int, dtype: torch.dtype
) -> None:
    p = values(n, dtype, seed=1)
    codes, absmax = torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // BLOCKSIZE))
    for step in range(3):
        g = values(n, dtype, seed=10 + step)
        wanted = by_formula_8bit(rule, p, g, codes, absmax, rule.settings)
        rule.op_8bit([p], [g], [codes], [absmax], **rule.settings)
        for got, want, name in zip(
            (p, codes, absmax), wanted, ("param", "codes", "absmax"), strict=True
        ):
            assert_same_bits(got, want, name)


@pytest.mark.parametrize(("rule", "change"), CHANGES, ids=lambda v: str(v) if v in CHANGES else "")
def test_settings(isa: str, rule: Rule, change: dict[str, Any]) -> None:
    p, g, m = (values(1000, seed=seed) for seed in range(3))
    settings = {**rule.settings, **change}
    wanted = by_formula(rule, p, g, m, settings)
    rule.op([p], [g], [m], **settings)
    assert_same_bits(p, wanted[0], "param")
    assert_same_bits(m, wanted[1], "moment")


@rules
def test_maximize_and_gradscalers_flags(isa: str, rule: Rule) -> None:
    p, g, m = (values(1000, seed=seed) for seed in range(3))
    wanted = by_formula(rule, p, g, m, rule.settings, maximize=True)
    unchanged = p.clone()
    rule.op([p], [g], [m], **rule.settings, found_inf=torch.ones(1))
    assert torch.equal(p, unchanged)
    scale = torch.tensor([8.0])  # a power of two divides out
    rule.op([p], [g * 8], [m], **rule.settings, maximize=True, grad_scale=scale)
    assert_same_bits(p, wanted[0], "param")
    assert_same_bits(m, wanted[1], "moment")


@rules
def test_a_gradient_that_is_not_finite_spoils_no_other(isa: str, rule: Rule) -> None:
    n = 600
    p, g, m = (values(n, seed=seed) for seed in range(3))
    g[5], g[300], g[599] = torch.nan, torch.inf, -torch.inf
    codes, absmax = encode(m, signed=True)
    wanted = by_formula_8bit(rule, p, g, codes, absmax, rule.settings)
    p8 = p.clone()
    rule.op_8bit([p8], [g], [codes], [absmax], **rule.settings)
    assert p8.isfinite().all() and absmax.isfinite().all()
    assert torch.equal(p8[[5, 300, 599]], p[[5, 300, 599]])
    assert_same_bits(p8, wanted[0], "param")
    wanted32 = by_formula(rule, p, g, m, rule.settings)
    rule.op([p], [g], [m], **rule.settings)
    assert_same_bits(p, wanted32[0], "param")
    assert m.isfinite().sum() == n - 3


@rules
def test_many_tensors_on_any_number_of_threads(isa: str, threads: int, rule: Rule) -> None:
    lengths = [0, 5, 256, 30_000, 7]
    ps, gs, ms = ([values(n, seed=seed + n) for n in lengths] for seed in range(3))
    wanted = [by_formula(rule, p, g, m, rule.settings) for p, g, m in zip(ps, gs, ms, strict=True)]
    rule.op(ps, gs, ms, **rule.settings)
    for p, m, (want_p, want_m) in zip(ps, ms, wanted, strict=True):
        assert_same_bits(p, want_p, "param")
        assert_same_bits(m, want_m, "moment")


@rules
def test_writes_nothing_outside(isa: str, sentinels: Sentinels, rule: Rule) -> None:
    for n in (1, 31, 256, 300):
        p, m = (sentinels(n, offset=4).copy_(values(n, seed=seed)) for seed in range(2))
        rule.op([p], [values(n)], [m], **rule.settings)
        codes = sentinels(n, torch.uint8, offset=1).zero_()
        absmax = sentinels(-(-n // BLOCKSIZE), offset=4).zero_()
        rule.op_8bit([p], [values(n)], [codes], [absmax], **rule.settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("weight_decay", -0.1), ("beta1", 1.5), ("momentum", -0.5), ("dampening", 2.0)],
)
def test_refuses_settings_by_name(name: str, value: float) -> None:
    for rule in (LION, SGD):
        if name not in rule.settings:
            continue
        lists = [[torch.zeros(4)] for _ in range(3)]
        with pytest.raises(ValueError, match=name):
            rule.op(*lists, **{**rule.settings, name: value})


@rules
def test_refuses_lists_by_name(rule: Rule) -> None:
    p, g, m = ([torch.zeros(4)] for _ in range(3))
    moment = "exp_avg" if rule is LION else "momentum_buffer"
    with pytest.raises(ValueError, match="grads"):
        rule.op(p, [], m, **rule.settings)
    with pytest.raises(ValueError, match=moment):
        rule.op(p, g, [torch.zeros(5)], **rule.settings)
    with pytest.raises(TypeError, match=moment):
        rule.op(p, g, [torch.zeros(4, dtype=torch.float64)], **rule.settings)
    with pytest.raises(ValueError, match=f"{moment}_absmax"):
        codes = [torch.zeros(4, dtype=torch.uint8)]
        rule.op_8bit(p, g, codes, [torch.zeros(2)], **rule.settings)
