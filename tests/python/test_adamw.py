"""adamw_step and adamw_8bit_step, against their formula in fp32 to the bit, and against float64.

The kernels do what cpp/cpu/adamw_inl.h writes down, each operation rounded once and in that
order. `step_fp32` does the same operations in numpy, which rounds likewise (torch.sqrt is off by an
ulp here and there), so that the two agree to the last bit on every instruction set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Sentinels
from moments_8bit import BLOCKSIZE, decode, encode
from qlora_native import ops, reference

pytestmark = pytest.mark.emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = {
    "empty": 0,
    "one": 1,
    "less than a vector": 3,
    "odd": 77,
    "a block less one": 255,
    "a block": 256,
    "a block and one": 257,
    "many blocks and a tail": 16 * 256 + 131,
    "for two threads": 40_001,
}
sizes = pytest.mark.parametrize("n", SIZES.values(), ids=SIZES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dataclass
class Hyper:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    step: int = 1
    maximize: bool = False

    def kwargs(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class State:
    """A parameter and its state; the 8-bit one has absmax too."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    absmax: list[Tensor] = field(default_factory=list)  # of exp_avg and of exp_avg_sq

    @property
    def tensors(self) -> list[Tensor]:
        return [self.param, self.exp_avg, self.exp_avg_sq, *self.absmax]

    def clone(self) -> State:
        return State(
            self.param.clone(),
            self.exp_avg.clone(),
            self.exp_avg_sq.clone(),
            [a.clone() for a in self.absmax],
        )


def state_32bit(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    param = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    return State(param, torch.zeros(n), torch.zeros(n))


def state_8bit(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    codes = torch.zeros(n, dtype=torch.uint8)
    absmax = torch.zeros(-(-n // BLOCKSIZE))
    param = state_32bit(n, dtype, seed).param
    return State(param, codes, codes.clone(), [absmax, absmax.clone()])


def gradient(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Magnitudes over six decades, as gradients have them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    decades = torch.rand(n, generator=generator) * 6 - 6
    return (torch.randn(n, generator=generator) * 10**decades).to(dtype)


def call(states: list[State], grads: list[Tensor], hyper: Hyper, **kwargs: Any) -> None:
    op = ops.adamw_8bit_step if states[0].absmax else ops.adamw_step
    columns = [list(column) for column in zip(*(s.tensors for s in states), strict=True)]
    params, *state = columns
    op(params, grads, *state, **hyper.kwargs(), **kwargs)


# ---- the formula in fp32, operation by operation -------------------------------------------------


def step_fp32(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: Hyper
) -> tuple[Tensor, Tensor, Tensor]:
    def f(value: float) -> np.float32:
        return np.float32(value)

    p_np, g_np, m_np, v_np = (t.to(torch.float32).numpy() for t in (p, g, m, v))
    with np.errstate(all="ignore"):
        if h.maximize:
            g_np = f(0) - g_np
        m_np = f(h.beta1) * m_np + f(1 - h.beta1) * g_np
        v_np = f(h.beta2) * v_np + f(1 - h.beta2) * g_np * g_np
        inv_sqrt_correction2 = f(1 / math.sqrt(1 - h.beta2**h.step))
        denominator = np.sqrt(v_np) * inv_sqrt_correction2 + f(h.eps)
        step_size = f(h.lr / (1 - h.beta1**h.step))
        p_np = p_np * f(1 - h.lr * h.weight_decay) - step_size * (m_np / denominator)
    return torch.from_numpy(p_np).to(p.dtype), torch.from_numpy(m_np), torch.from_numpy(v_np)


def step_8bit(s: State, g: Tensor, h: Hyper) -> State:
    m_old = decode(s.exp_avg, s.absmax[0], signed=True)
    v_old = decode(s.exp_avg_sq, s.absmax[1], signed=False)
    p, m, v = step_fp32(s.param, g, m_old, v_old, h)
    kept = ~v.isfinite()
    p, m, v = (torch.where(kept, old, new) for old, new in ((s.param, p), (m_old, m), (v_old, v)))
    (m_codes, m_absmax), (v_codes, v_absmax) = encode(m, signed=True), encode(v, signed=False)
    return State(p, m_codes, v_codes, [m_absmax, v_absmax])


def assert_same_bits(got: State, wanted: State) -> None:
    names = ("param", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
    for name, a, b in zip(names, got.tensors, wanted.tensors, strict=False):
        # NaN equals NaN here, whatever its payload.
        a_bits, b_bits = a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)
        where = (a_bits != b_bits).nonzero()
        assert where.numel() == 0, f"{name} differs at {where[:5].flatten().tolist()}"


# ---- to the bit ----------------------------------------------------------------------------------


@sizes
@dtypes
def test_32bit_is_the_fp32_formula_to_the_bit(isa: str, n: int, dtype: torch.dtype) -> None:
    state = state_32bit(n, dtype)
    wanted = state.clone()
    for step in range(1, 5):
        grad, hyper = gradient(n, dtype, step), Hyper(step=step)
        call([state], [grad], hyper)
        new = step_fp32(wanted.param, grad, wanted.exp_avg, wanted.exp_avg_sq, hyper)
        wanted = State(*new)
        assert_same_bits(state, wanted)


@sizes
@dtypes
def test_8bit_is_the_same_algorithm_written_in_torch(isa: str, n: int, dtype: torch.dtype) -> None:
    state = state_8bit(n, dtype)
    wanted = state.clone()
    for step in range(1, 5):
        grad, hyper = gradient(n, dtype, step), Hyper(step=step)
        call([state], [grad], hyper)
        wanted = step_8bit(wanted, grad, hyper)
        assert_same_bits(state, wanted)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": 0.0},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"eps": 1e-3},
        {"lr": 0.0},
        {"maximize": True},
        {"step": 10_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [32, 8])
def test_settings(isa: str, bits: int, changed: dict[str, Any]) -> None:
    n, hyper = 1000, Hyper(**changed)
    if bits == 8:
        state = state_8bit(n)
        wanted = step_8bit(state, gradient(n), hyper)
    else:
        state = state_32bit(n)
        wanted = State(*step_fp32(state.param, gradient(n), state.exp_avg, state.exp_avg_sq, hyper))
    call([state], [gradient(n)], hyper)
    assert_same_bits(state, wanted)


@pytest.mark.parametrize("make", [state_32bit, state_8bit], ids=["32-bit", "8-bit"])
def test_many_tensors_of_all_dtypes_in_one_call(isa: str, threads: int, make: Any) -> None:
    """Parameters and gradients of any two dtypes, some empty, some shared out over threads."""
    cases = [
        (n, p_dtype, g_dtype)
        for n in (0, 5, 256, 30_000)
        for p_dtype in DTYPES
        for g_dtype in DTYPES
    ]
    states = [make(n, p_dtype, seed=i) for i, (n, p_dtype, _) in enumerate(cases)]
    grads = [gradient(n, g_dtype, seed=i) for i, (n, _, g_dtype) in enumerate(cases)]
    alone = [state.clone() for state in states]
    call(states, grads, Hyper(step=3))
    for state, one, grad in zip(states, alone, grads, strict=True):
        call([one], [grad], Hyper(step=3))
        assert_same_bits(state, one)


@pytest.mark.parametrize("make", [state_32bit, state_8bit], ids=["32-bit", "8-bit"])
def test_writes_nothing_outside(isa: str, sentinels: Sentinels, make: Any) -> None:
    for n in (1, 31, 256, 300):
        for dtype in DTYPES:
            source = make(n, dtype)
            guarded = []
            for tensor in source.tensors:
                copy = sentinels(tensor.shape, tensor.dtype, offset=tensor.element_size())
                guarded.append(copy.copy_(tensor))
            state = State(*guarded[:3], guarded[3:])
            call([state], [gradient(n, dtype)], Hyper())
            call([source], [gradient(n, dtype)], Hyper())
            assert_same_bits(state, source)


# ---- against float64 and torch -------------------------------------------------------------------


def run_beside_float64(dtype: torch.dtype, steps: int, n: int = 5000) -> tuple[float, float, float]:
    """The largest distances to float64 of ours and of torch.optim.AdamW, and the largest |p|."""
    state = state_32bit(n, dtype)
    theirs = torch.nn.Parameter(state.param.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-3)
    exact = (state.param.double(), torch.zeros(n).double(), torch.zeros(n).double())
    for step in range(1, steps + 1):
        grad = gradient(n, dtype, step)
        call([state], [grad], Hyper(step=step))
        theirs.grad = grad
        optimizer.step()
        exact = reference.adamw(exact[0], grad, exact[1], exact[2], reference.AdamWHyper(step=step))
    our_error = (state.param.double() - exact[0]).abs().max().item()
    torch_error = (theirs.detach().double() - exact[0]).abs().max().item()
    return our_error, torch_error, exact[0].abs().max().item()


def test_fp32_error_is_at_most_twice_torchs(isa: str) -> None:
    our_error, torch_error, _ = run_beside_float64(torch.float32, steps=20)
    assert our_error <= 2 * torch_error


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_16bit_error_is_the_rounding_of_the_parameter(isa: str, dtype: torch.dtype) -> None:
    """Each step rounds a parameter once, by half an ulp; moments are fp32 and add nothing to it.

    (torch keeps 16-bit moments for 16-bit parameters; in fp16 the second one underflows to 0.)
    """
    steps = 20
    our_error, torch_error, largest = run_beside_float64(dtype, steps)
    assert our_error <= steps * torch.finfo(dtype).eps / 2 * largest
    assert math.isnan(torch_error) or our_error <= torch_error


def test_8bit_follows_32bit(isa: str) -> None:
    """A quadratic bowl: 8-bit state reaches the minimum that 32-bit state reaches.

    Codes are off by at most 1.5 % of the value (the map's steps grow as 0.014 of a decade's top),
    so a step is off by a few percent at most, and the way down is the same.
    """
    n = 4096
    target = torch.linspace(-1, 1, n)
    losses = []
    for make in (state_32bit, state_8bit):
        state = make(n)
        for step in range(1, 301):
            call([state], [state.param - target], Hyper(lr=1e-2, weight_decay=0.0, step=step))
        losses.append((state.param - target).square().mean().item())
    start = target.square().mean().item()
    assert losses[0] < 1e-3 * start
    assert losses[1] < 1e-3 * start


# ---- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [state_32bit, state_8bit], ids=["32-bit", "8-bit"])
def test_gradients_are_divided_by_grad_scale(isa: str, make: Any) -> None:
    n, scale = 1000, 1024.0  # a power of two, as GradScaler's are: scaling is then exact
    state, wanted = make(n), make(n)
    grad = gradient(n)
    call([state], [grad * scale], Hyper(), grad_scale=torch.tensor([scale]))
    call([wanted], [grad], Hyper())
    assert_same_bits(state, wanted)


@pytest.mark.parametrize("make", [state_32bit, state_8bit], ids=["32-bit", "8-bit"])
def test_found_inf_skips_the_whole_step(isa: str, make: Any) -> None:
    state = make(1000)
    call([state], [gradient(1000)], Hyper())
    before = state.clone()
    call([state], [gradient(1000, seed=1)], Hyper(step=2), found_inf=torch.tensor([1.0]))
    assert_same_bits(state, before)
    call([state], [gradient(1000, seed=1)], Hyper(step=2), found_inf=torch.tensor([0.0]))
    assert not torch.equal(state.param, before.param)


# ---- values that are not ordinary ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_8bit_leaves_a_value_alone_whose_gradient_or_its_square_is_not_finite(
    isa: str, bad: float
) -> None:
    """Its parameter and moments stay, and its neighbours move as if its gradient were zero."""
    n, at = 600, 300
    state = state_8bit(n)
    call([state], [gradient(n)], Hyper())
    before = state.clone()
    grad = gradient(n, seed=1)
    grad[at] = bad
    call([state], [grad], Hyper(step=2))
    assert_same_bits(state, step_8bit(before, grad, Hyper(step=2)))
    assert state.param[at] == before.param[at]
    assert all(t.isfinite().all() for t in state.tensors)
    for signed, moment in ((True, 1), (False, 2)):
        block = at // BLOCKSIZE
        absmax = state.absmax[moment - 1][block]
        old = decode(before.tensors[moment], before.absmax[moment - 1], signed)[at]
        new = decode(state.tensors[moment], state.absmax[moment - 1], signed)[at]
        assert abs(new - old) <= 0.01 * absmax  # encoded again, under the block's new scale
    others = torch.arange(n) != at
    assert (state.param != before.param)[others].all()


def test_32bit_spoils_only_that_value(isa: str) -> None:
    """As in torch."""
    n, at = 600, 300
    state = state_32bit(n)
    grad = gradient(n)
    grad[at] = math.nan
    call([state], [grad], Hyper())
    spoiled = torch.arange(n) == at
    for tensor in state.tensors:
        assert torch.equal(tensor.isnan(), spoiled)


def test_8bit_blocks_of_zeros_stay_zero(isa: str) -> None:
    state = state_8bit(700)
    start = state.param.clone()
    for step in (1, 2):
        call([state], [torch.zeros(700)], Hyper(step=step, weight_decay=0.0))
    assert torch.equal(state.param, start)
    assert all(absmax.eq(0).all() for absmax in state.absmax)
    assert state.exp_avg.eq(127).all()  # the signed map's code of zero
    assert state.exp_avg_sq.eq(0).all()


def test_8bit_tiny_gradients(isa: str) -> None:
    """Second moments so small that fp32 holds them as subnormals, or not at all."""
    for scale in (1e-18, 1e-20, 1e-30, 1e-40):
        state = state_8bit(512)
        wanted = state.clone()
        for step in (1, 2):
            grad = torch.randn(512, generator=torch.Generator().manual_seed(step)) * scale
            call([state], [grad], Hyper(step=step))
            wanted = step_8bit(wanted, grad, Hyper(step=step))
            assert_same_bits(state, wanted)


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [state_32bit, state_8bit], ids=["32-bit", "8-bit"])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, make: Any) -> None:
    sizes = (100_003, 17, 70_000)
    start = [make(n, seed=n) for n in sizes]
    grads = {step: [gradient(n, seed=step) for n in sizes] for step in (1, 2)}
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        states = [state.clone() for state in start]
        for step, step_grads in grads.items():
            call(states, step_grads, Hyper(step=step))
        results.append(states)
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("make", [state_32bit, state_8bit], ids=["32-bit", "8-bit"])
def test_a_gradient_that_is_not_contiguous(isa: str, make: Any) -> None:
    n = 48
    flat, square = make(n * n), make(n * n)
    grad = gradient(n * n).view(n, n).t()
    for tensors in (square,):
        for name in ("param", "exp_avg", "exp_avg_sq"):
            setattr(tensors, name, getattr(tensors, name).view(n, n))
    call([square], [grad], Hyper())
    call([flat], [grad.contiguous().flatten()], Hyper())
    assert torch.equal(square.param.flatten(), flat.param)


# ---- any case ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 1100),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-38, 37),
    special=st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e-45, 3e38]),
    step=st.integers(1, 10**6),
    seed=st.integers(0, 2**16),
)
def test_8bit_any_case(
    n: int, dtype: torch.dtype, exponent: int, special: float, step: int, seed: int
) -> None:
    state = state_8bit(n, dtype, seed)
    wanted = state.clone()
    generator = torch.Generator().manual_seed(seed)
    hyper = Hyper(step=step)
    for _ in range(2):
        grad = (torch.randn(n, generator=generator) * 10.0**exponent).to(dtype)
        grad[torch.rand(n, generator=generator) < 0.05] = special
        call([state], [grad], hyper)
        wanted = step_8bit(wanted, grad, hyper)
        assert_same_bits(state, wanted)
