"""optim.AdamW and optim.AdamW8bit as torch optimizers: what trainers do with one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_native.optim import AdamW, AdamW8bit

both = pytest.mark.parametrize("make", [AdamW, AdamW8bit])
Make = Callable[..., Optimizer]


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


@both
def test_groups_have_their_own_settings(make: Make) -> None:
    params = parameters()
    alone = copies(params)
    settings = [{"lr": 1e-2, "weight_decay": 0.0}, {"betas": (0.5, 0.9), "eps": 1e-4}, {"lr": 0.0}]
    together = make([{"params": [p], **s} for p, s in zip(params, settings, strict=True)])
    train(together, params, range(3))
    optimizers = [make([p], **s) for p, s in zip(alone, settings, strict=True)]
    for step in range(3):
        set_grads(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(params, alone)


@both
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


@both
def test_step_counts_are_each_parameters_own(make: Make) -> None:
    """One that joins later starts its bias correction at its own first step."""
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
    assert optimizer.state[first]["step"] == 6
    assert optimizer.state[later]["step"] == 3
    assert torch.equal(later, alone)


@both
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


@both
@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2])])
def test_lr_may_be_a_tensor(make: Make, lr: Tensor) -> None:
    params, wanted = parameters(), parameters()
    train(make(params, lr=lr), params, range(2))
    train(make(wanted, lr=float(lr)), wanted, range(2))
    assert_equal(params, wanted)


@both
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


@both
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
    assert optimizer.state[params[0]]["step"] == 3
    assert_equal(params, wanted)  # scales are powers of two: dividing by them is exact


@both
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


# ---- state in and out ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resumes_to_the_bit(make: Make, dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    optimizer = make(straight, lr=1e-2)
    train(optimizer, straight, range(4))
    saved = through_disk(optimizer.state_dict())
    resumed = copies(straight)
    train(optimizer, straight, range(4, 8))

    other = make(resumed, lr=5.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 1e-2
    again = other.state_dict()
    for i, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert again["state"][i][key].dtype is value.dtype
                assert torch.equal(again["state"][i][key], value)
            else:
                assert again["state"][i][key] == value
    train(other, resumed, range(4, 8))
    assert_equal(straight, resumed)


@both
def test_a_loaded_state_is_a_copy(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others = copies(params)
    other = make(others)
    other.load_state_dict(saved)
    train(other, others, range(1, 3))
    for i, state in kept["state"].items():
        assert torch.equal(saved["state"][i]["exp_avg"], state["exp_avg"])


@both
def test_hooks_of_the_user_run(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(1))
    seen = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict["param_groups"][0]["lr"] = 0.5
        return state_dict

    def after(opt: Optimizer) -> None:
        seen.append(opt.state[params[0]]["exp_avg"].dtype)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == [torch.uint8 if make is AdamW8bit else torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loads_torchs_state_and_gives_it_back(dtype: torch.dtype) -> None:
    theirs = parameters(dtype)
    torch_optimizer = torch.optim.AdamW(theirs, lr=1e-2)
    train(torch_optimizer, theirs, range(3))
    ours = copies(theirs)
    optimizer = AdamW(ours)
    optimizer.load_state_dict(torch_optimizer.state_dict())
    state, torch_state = optimizer.state[ours[0]], torch_optimizer.state[theirs[0]]
    assert state["step"] == 3
    assert torch.equal(state["exp_avg"], torch_state["exp_avg"].float())

    train(optimizer, ours, range(3, 5))
    back = torch.optim.AdamW(copies(ours))
    back.load_state_dict(optimizer.state_dict())
    assert all(float(s["step"]) == 5 for s in back.state.values())


@both
def test_deepcopy_and_pickle(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin_params = twin.param_groups[0]["params"]
        assert_equal(params, twin_params)
        straight = copy.deepcopy(optimizer)
        straight_params = straight.param_groups[0]["params"]
        train(straight, straight_params, range(2, 4))
        train(twin, twin_params, range(2, 4))
        assert_equal(straight_params, twin_params)


def stepped(make: Make, **settings: Any) -> dict[str, Any]:
    params = parameters()
    optimizer = make(params, **settings)
    train(optimizer, params, range(1))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "saved", "message"),
    [
        (AdamW, lambda: stepped(AdamW8bit), r"state\[0\] must have step, exp_avg, exp_avg_sq, got"),
        (AdamW8bit, lambda: stepped(AdamW), r"must have .*exp_avg_absmax"),
        (AdamW, lambda: stepped(torch.optim.AdamW, amsgrad=True), "amsgrad must be False"),
    ],
    ids=["8-bit into AdamW", "32-bit into AdamW8bit", "amsgrad"],
)
def test_state_of_another_kind_is_refused(
    make: Make, saved: Callable[[], dict[str, Any]], message: str
) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_state_of_another_shape_is_refused() -> None:
    params = parameters()[:1]
    optimizer = AdamW(params)
    saved = stepped(AdamW)
    saved["param_groups"][0]["params"] = [0]
    saved["state"] = {0: saved["state"][1]}
    with pytest.raises(ValueError, match=r"state\[0\]\['exp_avg'\] must be .* of shape \[80, 70\]"):
        optimizer.load_state_dict(saved)


# ---- what is refused -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite and not negative, got nan"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one value"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps must be finite and not negative"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
        ({"amsgrad": True}, "amsgrad must be False"),
        ({"capturable": True}, "capturable must be False"),
        ({"differentiable": True}, "differentiable must be False"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(), **settings)


def test_bad_min_8bit_size() -> None:
    with pytest.raises(ValueError, match="min_8bit_size must not be negative, got -1"):
        AdamW8bit(parameters(), min_8bit_size=-1)


@both
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


@both
def test_sparse_gradients_are_refused(make: Make) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="needs dense gradients, got one with layout"):
        make(embedding.parameters()).step()
