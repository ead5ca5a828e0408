"""The optimizers as torch optimizers: steps, settings, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import (
    Make,
    assert_equal,
    copies,
    each,
    parameters,
    set_grads,
    train,
)
from qlora_native.optim import SGD, AdamW, AdamW8bit, Lion, Lion8bit, SGD8bit

# ---- the step ------------------------------------------------------------------------------------


def test_follows_torch() -> None:
    ours = parameters()
    theirs = copies(ours)
    optimizer, torch_optimizer = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    train(optimizer, ours, range(10))
    train(torch_optimizer, theirs, range(10))
    for a, b in zip(ours, theirs, strict=True):
        # Ten steps of 1e-2, each off by a few ulps of the update.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"dampening": 0.3},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_follows_torch(options: dict[str, Any]) -> None:
    ours = parameters()
    theirs = copies(ours)
    settings = {"lr": 1e-2, "momentum": 0.9, **options}
    train(SGD(ours, **settings), ours, range(10))
    train(torch.optim.SGD(theirs, **settings), theirs, range(10))
    for a, b in zip(ours, theirs, strict=True):
        # Ten steps of some 1e-2 to 1e-1, each off by a few ulps of the update.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# Of ten steps of lr = 1e-3. In fp32 their compiler may fuse a product and a sum. In 8 bits a moment
# may get the neighbouring code, at most 1/64 of its block's absmax away, some 10 here; momentum
# hands that on. Lion moves by a sign, which hardly ever hangs on that.
@pytest.mark.parametrize(
    ("make", "settings", "most", "share"),
    [
        (Lion, {"weight_decay": 0.1}, 1e-6, 0.0),
        (Lion8bit, {"weight_decay": 0.1}, 2e-2, 0.002),
        (SGD, {"momentum": 0.9, "weight_decay": 0.1}, 1e-6, 0.0),
        (SGD8bit, {"momentum": 0.9, "weight_decay": 0.1}, 1.5e-3, 0.02),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_follows_bitsandbytes(
    make: Make, settings: dict[str, Any], most: float, share: float
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours = parameters()[:2]
    theirs = copies(ours)
    peer = getattr(bitsandbytes.optim, make.__name__)(theirs, lr=1e-3, **settings)
    train(make(ours, lr=1e-3, **settings), ours, range(10))
    train(peer, theirs, range(10))
    for a, b in zip(ours, theirs, strict=True):
        difference = (a - b).abs()
        assert difference.max() <= most
        assert (difference > 1e-6).float().mean() <= share


def test_kinds_of_state() -> None:
    """8-bit from 4096 values on, as in bitsandbytes; fp32 whatever the parameter's dtype."""
    params = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (4095, 4096)]
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(1))
    small, large = (optimizer.state[p] for p in params)
    assert set(small) == {"step", "exp_avg", "exp_avg_sq"}
    assert small["exp_avg"].dtype is torch.float32
    assert large["exp_avg"].dtype is torch.uint8
    assert large["exp_avg_sq"].dtype is torch.uint8
    assert large["exp_avg_absmax"].shape == (16,)
    assert large["exp_avg_absmax"].dtype is torch.float32


def test_min_8bit_size_for_each_group() -> None:
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = AdamW8bit(
        [{"params": params[:1]}, {"params": params[1:], "min_8bit_size": 0}], min_8bit_size=301
    )
    train(optimizer, params, range(1))
    assert optimizer.state[params[0]]["exp_avg"].dtype is torch.float32
    assert optimizer.state[params[1]]["exp_avg"].dtype is torch.uint8


@each
def test_groups_have_their_own_settings(make: Make) -> None:
    params = parameters()
    alone = copies(params)
    of_rule = {"momentum": 0.5} if issubclass(make, (SGD, SGD8bit)) else {"betas": (0.5, 0.9)}
    settings = [{"lr": 1e-2, "weight_decay": 0.0}, of_rule, {"lr": 0.0}]
    together = make([{"params": [p], **s} for p, s in zip(params, settings, strict=True)])
    train(together, params, range(3))
    optimizers = [make([p], **s) for p, s in zip(alone, settings, strict=True)]
    for step in range(3):
        set_grads(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(params, alone)


@each
def test_parameters_without_a_gradient_stay(make: Make) -> None:
    params = parameters()
    before = copies(params)
    optimizer = make(params)
    set_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert params[1] not in optimizer.state
    assert not torch.equal(params[0], before[0])


@each
def test_step_counts_are_each_parameters_own(make: Make) -> None:
    """One that joins later has a first step of its own: the bias correction, the buffer."""
    first, later = (nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = make([first])
    train(optimizer, [first], range(3))
    optimizer.add_param_group({"params": [later], "lr": 1e-2})
    alone = nn.Parameter(torch.ones(5000))
    optimizer_alone = make([alone], lr=1e-2)
    for step in range(3, 6):
        set_grads([first, later], step)
        optimizer.step()
        alone.grad = later.grad
        optimizer_alone.step()
    for param, count in ((first, 6), (later, 3)):
        assert all(optimizer.state[param][key] == count for key in make.counters)
    assert torch.equal(later, alone)


@each
def test_closure(make: Make) -> None:
    params = parameters()[:1]
    optimizer = make(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


@each
@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2])])
def test_lr_may_be_a_tensor(make: Make, lr: Tensor) -> None:
    params, wanted = parameters(), parameters()
    train(make(params, lr=lr), params, range(2))
    train(make(wanted, lr=float(lr)), wanted, range(2))
    assert_equal(params, wanted)


@each
def test_schedulers_rule_the_learning_rate(make: Make) -> None:
    params, by_hand = parameters(), parameters()
    optimizer, other = make(params, lr=1e-2), make(by_hand, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
        ],
        milestones=[3],
    )
    for step in range(8):
        other.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        train(optimizer, params, range(step, step + 1))
        train(other, by_hand, range(step, step + 1))
        scheduler.step()
    assert_equal(params, by_hand)


# ---- GradScaler ----------------------------------------------------------------------------------


@each
def test_grad_scaler(make: Make) -> None:
    """A step whose gradients overflowed is left out, and is not counted."""
    params, wanted = parameters()[:2], parameters()[:2]
    optimizer, plain = make(params), make(wanted)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    inputs = torch.randn(4, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        overflow = step == 1
        for ps, backward in ((params, scaler.scale), (wanted, lambda loss: loss)):
            for p in ps:
                p.grad = None
            loss = sum(p.square().sum() * inputs[step] for p in ps)
            backward(loss).backward()
        if overflow:
            params[0].grad[0] = torch.inf
            before = copies(params)
        else:
            plain.step()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_equal(params, before)
            assert scaler.get_scale() == 2.0**9
    assert all(optimizer.state[params[0]][key] == 3 for key in make.counters)
    assert_equal(params, wanted)  # scales are powers of two: dividing by them is exact


@each
def test_grad_scaler_with_clipping(make: Make) -> None:
    """unscale_ before the step: it must not be divided twice."""
    params, wanted = parameters()[:1], parameters()[:1]
    optimizer, plain = make(params), make(wanted)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(params[0].square().sum()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(params, 1.0)
    scaler.step(optimizer)
    wanted[0].square().sum().backward()
    nn.utils.clip_grad_norm_(wanted, 1.0)
    plain.step()
    assert_equal(params, wanted)


# ---- what is refused -----------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite and not negative, got nan"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one value"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(), **settings)


@pytest.mark.parametrize(
    ("makes", "settings", "message"),
    [
        (
            (AdamW, AdamW8bit, Lion, Lion8bit),
            {"betas": (1.0, 0.9)},
            r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)",
        ),
        ((AdamW, AdamW8bit, Lion, Lion8bit), {"betas": (0.9,)}, "betas must be two numbers"),
        ((AdamW, AdamW8bit), {"eps": -1e-8}, "eps must be finite and not negative"),
        ((AdamW, AdamW8bit), {"amsgrad": True}, "amsgrad must be False"),
        ((AdamW, AdamW8bit), {"capturable": True}, "capturable must be False"),
        ((AdamW, AdamW8bit, SGD, SGD8bit), {"differentiable": True}, "differentiable must be"),
        ((SGD, SGD8bit), {"momentum": 0.0}, "momentum must be .* torch.optim.SGD keeps no state"),
        ((SGD, SGD8bit), {"dampening": 1.0}, r"dampening must be in \[0, 1\)"),
        ((SGD, SGD8bit), {"dampening": 0.5, "nesterov": True}, "dampening must be 0 with nesterov"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_of_a_rule(
    makes: tuple[Make, ...], settings: dict[str, Any], message: str
) -> None:
    for make in makes:
        with pytest.raises(ValueError, match=message):
            make(parameters(), **settings)


def test_bad_min_8bit_size() -> None:
    with pytest.raises(ValueError, match="min_8bit_size must not be negative, got -1"):
        AdamW8bit(parameters(), min_8bit_size=-1)


@each
@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (torch.ones(4, dtype=torch.float64), TypeError, r"params\[0\] must have dtype .*float64"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "must have dtype .*complex64"),
        (torch.ones(4, 5).t(), ValueError, r"params\[0\] must be contiguous, got strides \(1, 5\)"),
        (torch.eye(3).to_sparse(), ValueError, "must be dense, got layout torch.sparse_coo"),
    ],
    ids=["float64", "complex", "not contiguous", "sparse"],
)
def test_bad_parameters(make: Make, param: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make([nn.Parameter(param)])
    optimizer = make(parameters())
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(param)]})
    assert len(optimizer.param_groups) == 1


@each
def test_sparse_gradients_are_refused(make: Make) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="needs dense gradients, got one with layout"):
        make(embedding.parameters()).step()
