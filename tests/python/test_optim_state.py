"""The optimizers' state: saved, loaded, copied, torch's own, refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizers import (
    Make,
    assert_equal,
    copies,
    each,
    parameters,
    through_disk,
    train,
)
from qlora_native.optim import SGD, AdamW, AdamW8bit


@each
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


@each
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
        assert all(torch.equal(saved["state"][i][key], state[key]) for key in make.moments)


@each
def test_hooks_of_the_user_run(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(1))
    seen = []

    def before(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict["param_groups"][0]["lr"] = 0.5
        return state_dict

    def after(opt: Optimizer) -> None:
        seen.append(opt.state[params[0]][make.moments[0]].dtype)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == [torch.uint8 if "8bit" in make.__name__ else torch.float32]


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


def test_loads_torchs_sgd_state_and_gives_it_back() -> None:
    """Training goes on as torch's own would have; a state not yet begun is none."""
    theirs = parameters()
    torch_optimizer = torch.optim.SGD(theirs, lr=1e-2, momentum=0.9)
    train(torch_optimizer, theirs, range(3))
    ours = copies(theirs)
    optimizer = SGD(ours)
    optimizer.load_state_dict(torch_optimizer.state_dict())
    train(optimizer, ours, range(3, 5))
    train(torch_optimizer, theirs, range(3, 5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    back = torch.optim.SGD(copies(ours), lr=1e-2, momentum=0.9)
    back.load_state_dict(optimizer.state_dict())
    for state, other in zip(back.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])


@each
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
