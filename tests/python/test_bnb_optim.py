"""qlora_native.bitsandbytes.optim beside the package from PyPI: values, state, files, settings."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch

import qlora_native.bitsandbytes as ours

theirs = pytest.importorskip("bitsandbytes")

SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01}
CASES = [
    *((name, {"lr": 1e-2, "weight_decay": 0.01}) for name in ("Adam", "AdamW", "Lion")),
    *((f"{name}8bit", {"lr": 1e-2}) for name in ("Adam", "AdamW", "Lion")),
    *((f"{name}32bit", {"lr": 1e-2}) for name in ("Adam", "AdamW", "Lion")),
    ("AdamW", {"lr": 1e-2, "optim_bits": 8}),
    *((name, SGD) for name in ("SGD", "SGD8bit", "SGD32bit")),
]
WRAPPED = "__bnb_optimizer_quant_state__"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_managers():
    for package in (theirs, ours):
        package.optim.GlobalOptimManager.get_instance().initialize()


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((64, 128), (7,))
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def steps(optimizers, count: int, seed: int = 2) -> None:
    """The same gradients for the parameters of each."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    for _ in range(count):
        for same in zip(*lists, strict=True):
            grad = 0.1 * torch.randn(same[0].shape, generator=generator)
            for param in same:
                param.grad = grad.to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()


def layout(value):
    if isinstance(value, dict):
        return {key: layout(inner) for key, inner in value.items()}
    return (value.dtype, value.shape) if torch.is_tensor(value) else type(value)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def distance(a, b) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_state_and_files_both_ways(name, options, dtype):
    lists = [parameters(dtype), parameters(dtype)]
    pair = [
        getattr(package.optim, name)(params, **options)
        for package, params in zip((theirs, ours), lists, strict=True)
    ]
    steps(pair, 1)
    # From zeros, state of both kinds makes the same step: moments are encoded after it.
    assert distance(*lists) <= torch.finfo(dtype).eps
    a, b = (optimizer.state_dict() for optimizer in pair)
    assert layout(a["state"]) == layout(b["state"])
    assert a["param_groups"][0].keys() == b["param_groups"][0].keys()

    # What one package saved, the other goes on with as its writer does: its first step after
    # that is exact again where it reads codes and scales rightly.
    for writer, state, params, reader in ((0, a, lists[0], ours), (1, b, lists[1], theirs)):
        other = getattr(reader.optim, name)(copy.deepcopy(params), **options)
        other.load_state_dict(through_a_file(state))
        for key, saved in state["state"].items():
            read = other.state_dict()["state"][key][WRAPPED]
            assert all(torch.equal(read[k], value) for k, value in saved[WRAPPED].items())
        twin = getattr((theirs, ours)[writer].optim, name)(copy.deepcopy(params), **options)
        twin.load_state_dict(through_a_file(state))
        steps((other, twin), 1, seed=3)
        moved = [[p for g in o.param_groups for p in g["params"]] for o in (other, twin)]
        assert distance(*moved) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD"])
def test_twenty_steps_with_32_bits(name):
    options = SGD if name == "SGD" else {"lr": 1e-2, "weight_decay": 0.01}
    lists = [parameters(torch.float32), parameters(torch.float32)]
    steps([getattr(p.optim, name)(q, **options) for p, q in zip((theirs, ours), lists)], 20)  # noqa: B905
    assert distance(*lists) < 1e-6


def test_parameters_with_settings_of_their_own():
    for package in (theirs, ours):
        params = parameters(torch.float32)
        manager = package.optim.GlobalOptimManager.get_instance()
        manager.register_parameters(params)
        optimizer = package.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)
        manager.override_config(params[0], "optim_bits", 32)
        manager.override_config(params[1], key_value_dict={"lr": 0.0, "weight_decay": 0.0})
        before = params[1].detach().clone()
        steps([optimizer], 1)
        assert optimizer.state[params[0]]["state1"].dtype == torch.float32
        assert optimizer.state[params[1]]["state1"].dtype == torch.uint8
        assert torch.equal(params[1], before)


def test_module_overrides_are_read_at_the_first_step():
    embedding = torch.nn.Embedding(100, 64)
    manager = ours.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    optimizer = ours.optim.AdamW(embedding.parameters(), optim_bits=8)
    steps([optimizer], 1)
    assert optimizer.state[embedding.weight]["state1"].dtype == torch.float32
    again = ours.optim.AdamW(embedding.parameters(), optim_bits=8)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[embedding.weight]["state1"].dtype == torch.float32


def test_parameters_and_gradients_that_are_not_contiguous():
    param = torch.nn.Parameter(torch.randn(64, 128).t())
    twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    grad = torch.randn(64, 128).t()
    for p, g in ((param, grad), (twin, grad.contiguous())):
        p.grad = g
        ours.optim.AdamW([p]).step()
    assert torch.equal(param, twin)


def test_schedulers_and_grad_scaler():
    params = parameters(torch.float32)
    optimizer = ours.optim.AdamW8bit([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = params[1].detach().clone()
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert torch.equal(params[1], before)


NOT_HERE = ("RMSprop", "Adagrad8bit", "LAMB32bit", "LARS", "AdEMAMix", "PytorchLARS")


@pytest.mark.parametrize("name", NOT_HERE)
def test_rules_that_are_not_here_say_so(name):
    with pytest.raises(NotImplementedError, match=f"has no {name}: "):
        getattr(ours.optim, name)(parameters(torch.float32))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: ours.optim.AdamW(p, amsgrad=True), ValueError, "amsgrad"),
        (lambda p: ours.optim.AdamW8bit(p, optim_bits=8), ValueError, "optim_bits"),
        (lambda p: ours.optim.AdamW(p, optim_bits=4), NotImplementedError, "optim_bits"),
        (lambda p: ours.optim.AdamW(p, lr=-1.0), ValueError, "lr"),
        (lambda p: ours.optim.AdamW(p, betas=(0.9, 1.0)), ValueError, "betas"),
        (lambda p: ours.optim.SGD(p, 0.1), NotImplementedError, "momentum"),
        (lambda p: ours.optim.GlobalOptimManager(), RuntimeError, "get_instance"),
        (
            lambda p: ours.optim.AdamW(
                p,
                args=SimpleNamespace(
                    optim_bits=8, min_8bit_size=1, max_unorm=1.0, skip_zeros=False
                ),
            ),
            NotImplementedError,
            "max_unorm",
        ),
    ],
)
def test_errors_name_the_setting(make, error, message):
    with pytest.raises(error, match=message):
        make(parameters(torch.float32))


def test_sgd_warns_of_what_the_package_ignores():
    with pytest.warns(UserWarning, match="nesterov"):
        ours.optim.SGD(parameters(torch.float32), 0.1, momentum=0.9, nesterov=True)


# ---- paged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda p: ours.optim.PagedAdamW8bit(p), "AdamW8bit"),
        (lambda p: ours.optim.PagedAdamW32bit(p), "AdamW"),
        (lambda p: ours.optim.AdamW(p, optim_bits=8, is_paged=True), "AdamW8bit"),
        (lambda p: ours.optim.PagedLion8bit(p), "Lion8bit"),
        (lambda p: ours.optim.PagedAdam(p), "Adam"),
    ],
)
def test_paged_state_gives_the_plain_ones_bits(make, plain):
    lists = [[torch.nn.Parameter(torch.ones(400, 300)), *parameters(torch.float32)] for _ in "ab"]
    pair = [make(lists[0]), getattr(ours.optim, plain)(lists[1])]
    steps(pair, 2)
    assert distance(*lists) == 0.0
    assert pair[0].is_paged and pair[0].paging()["pager"] == "file"
    assert not pair[1].is_paged and pair[1].paging()["pager"] is None
    again = make(copy.deepcopy(lists[0]))
    again.load_state_dict(through_a_file(pair[1].state_dict()))
    assert again.paging()["bytes"] == pair[0].paging()["bytes"] > 0
    steps((again, pair[1]), 1)
    assert distance([p for g in again.param_groups for p in g["params"]], lists[1]) == 0.0


def test_a_copy_goes_on_as_its_model():
    params = parameters(torch.float32)
    optimizer = ours.optim.AdamW8bit(params, lr=1e-2)
    steps([optimizer], 1)
    twin = copy.deepcopy(optimizer)
    steps([optimizer, twin], 1)
    assert distance(params, twin.param_groups[0]["params"]) == 0.0
