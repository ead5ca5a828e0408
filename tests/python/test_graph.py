"""A quantized model with adapters as one graph: compiled, exported, recomputed, functionalized.

Graphs are traced whole and run on the ops themselves (backend "aot_eager"): what a code generator
makes of the rest is not ours. The slow test is the one that asks it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_native import ops
from qlora_native.model import add_lora, merge, quantize, trainable_parameters
from tiny_models import shake_adapters, some_ids, tiny_llama

SHAPES = ((2, 12), (3, 9), (5, 16), (2, 7))


@pytest.fixture(autouse=True)
def _no_recompilation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def adapted_llama(**adapter: Any) -> Any:
    model = tiny_llama(attn_implementation="sdpa", num_hidden_layers=1)
    quantize(model)
    add_lora(model, r=4, alpha=8, **adapter)
    shake_adapters(model)
    return model.train()


def loss_and_gradients(model: Any, call: Callable[..., Any], ids: Tensor) -> list[Tensor]:
    torch.manual_seed(3)  # of the dropout masks
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, trainable_parameters(model))]


def assert_one_graph(model: Any, shapes: tuple[tuple[int, int], ...], **compile: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True, **compile)
    for shape in shapes:
        ids = some_ids(*shape)
        got = loss_and_gradients(model, compiled, ids)
        for g, w in zip(got, loss_and_gradients(model, model, ids), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_a_llama_with_adapters_is_one_graph_for_every_batch_and_length() -> None:
    assert_one_graph(adapted_llama(dropout=0.1), SHAPES, backend="aot_eager")


@pytest.mark.slow
def test_a_llama_with_adapters_compiles_with_the_default_backend() -> None:
    assert_one_graph(adapted_llama(), SHAPES[:2])


class Two(nn.Module):
    """Two linears and nothing else, which trace in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted_two(**adapter: Any) -> Two:
    torch.manual_seed(0)
    model = Two()
    quantize(model)
    add_lora(model, r=4, alpha=8, **adapter)
    shake_adapters(model)
    return model


def dora(model: Two) -> None:
    model(torch.randn(1, 32))  # the base weights' norms, which are kept from the first call on


@pytest.mark.parametrize(
    "adapter, prepare",
    [({}, None), ({"use_dora": True}, dora), ({}, merge)],
    ids=["lora", "dora", "merged"],
)
def test_every_kind_of_layer_is_one_graph(
    adapter: dict[str, Any], prepare: Callable[[Two], None] | None
) -> None:
    model = adapted_two(**adapter)
    if prepare is not None:
        prepare(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 9):
        x = torch.randn(rows, 32, requires_grad=True)
        got, wanted = compiled(x), model(x)
        assert torch.equal(got, wanted)
        for pair in zip(
            torch.autograd.grad(got.sum(), x), torch.autograd.grad(wanted.sum(), x), strict=True
        ):
            assert torch.equal(*pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_traced_into_the_graph(dtype: torch.dtype) -> None:
    model = adapted_two()

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            y = call(x)
        return [y, *torch.autograd.grad(y.float().sum(), trainable_parameters(model))]

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 6):
        x = torch.randn(rows, 32)
        for got, wanted in zip(run(compiled), run(model), strict=True):
            assert torch.equal(got, wanted)


# ---- export --------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def test_inference_is_exported_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted_llama().eval().requires_grad_(False)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", max=64)
    exported = torch.export.export(
        Logits(model), (some_ids(2, 12),), dynamic_shapes=({0: batch, 1: length},)
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    called = {str(node.target) for node in exported.graph.nodes}
    assert "qlora_native.qlora_linear.default" in called
    for shape in SHAPES:
        ids = some_ids(*shape)
        with torch.no_grad():
            assert torch.equal(loaded(ids), model(input_ids=ids).logits)


# ---- recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_bits(use_reentrant: bool) -> None:
    model = adapted_llama(dropout=0.1)
    ids = some_ids()
    wanted = loss_and_gradients(model, model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    got = [loss.detach(), *(p.grad for p in trainable_parameters(model))]
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


# ---- functionalization ---------------------------------------------------------------------------


def adamw(params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]]) -> None:
    ops.adamw_step(
        params, grads, *state, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1
    )


def lion_8bit(params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]]) -> None:
    ops.lion_8bit_step(params, grads, *state, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1)


STATES: dict[Callable[..., None], Callable[[], list[list[Tensor]]]] = {
    adamw: lambda: [[torch.zeros(300), torch.zeros(2, 3)] for _ in range(2)],
    lion_8bit: lambda: [
        [torch.zeros(300, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)],
        [torch.zeros(2), torch.zeros(1)],
    ],
}


@pytest.mark.parametrize("step", STATES, ids=lambda step: step.__name__)
def test_an_optimizer_step_in_a_graph_writes_what_it_should(step: Callable[..., None]) -> None:
    def program(params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]]) -> Tensor:
        before = params[0] * 2  # read before the step, and after it
        step(params, grads, state)
        return before + params[0].view(-1)

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.randn(300), torch.randn(2, 3)]
        grads = [torch.randn(300), torch.randn(2, 3)]
        state = STATES[step]()
        return [call(params, grads, state), *params, *(t for moment in state for t in moment)]

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled), run(program), strict=True):
        assert torch.equal(got, wanted)
