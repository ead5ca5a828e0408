"""Experts that are stacked parameters, in 4 bits: their numbers, their names, their copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_native.experts import Experts4bit, StackedLinear4bit, is_experts
from qlora_native.loading import CheckpointError, load_model
from qlora_native.model import footprint, quantize, quantized_experts
from test_families import MIXTURES, batch, logits, save_family

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def experts_of(name: str, folder: Path) -> nn.Module:
    """The first experts module of a tiny model."""
    model = save_family(name, folder)
    return next(module for module in model.modules() if is_experts(module))


def route(tokens: int = 12, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 64, generator=generator)
    scores = torch.randn(tokens, experts, generator=generator).softmax(-1)
    weights, index = scores.topk(2)
    return x, index, weights


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_outputs_and_gradients_are_those_of_the_dequantized_module(
    name: str, implementation: str, tmp_path: Path
) -> None:
    ours = Experts4bit.from_module(experts_of(name, tmp_path))
    theirs = ours.to_module(torch.float32)
    theirs.config._experts_implementation = implementation

    def run(experts: nn.Module) -> list[Tensor]:
        x, index, weights = route()
        x, weights = x.requires_grad_(), weights.requires_grad_()
        y = experts(x, index, weights)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weights))]

    for got, wanted in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_an_expert_may_get_no_token(tmp_path: Path) -> None:
    ours = Experts4bit.from_module(experts_of("Mixtral", tmp_path))
    x, _, weights = route()
    index = torch.tensor([[3, 1]]).expand(12, 2)
    y = ours.to_module(torch.float32)(x, index, weights)
    torch.testing.assert_close(ours(x, index, weights), y, rtol=1e-4, atol=1e-5)
    assert ours(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_a_mixture_is_one_graph(tmp_path: Path) -> None:
    ours = Experts4bit.from_module(experts_of("Qwen 3 MoE", tmp_path))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (12, 7):
        inputs = route(tokens)
        assert torch.equal(compiled(*inputs), ours(*inputs))


def test_under_autocast_experts_compute_in_its_dtype(tmp_path: Path) -> None:
    ours = Experts4bit.from_module(experts_of("Mixtral", tmp_path))
    x, index, weights = route()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x, index, weights)
    assert y.dtype == torch.float32  # as hidden_states
    torch.testing.assert_close(y, ours(x, index, weights), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stack_has_bitsandbytes_bits_and_names(double_quant: bool, tmp_path: Path) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    experts = experts_of("Mixtral", tmp_path)
    ours = Experts4bit.from_module(
        copy.deepcopy(experts), double_quant=double_quant, scale_rounding="bitsandbytes_cpu"
    )
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(
            experts, name, compress_statistics=double_quant, quant_type="nf4", blocksize=64
        )
    theirs = experts.state_dict()
    mine = ours.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key].data), key


@pytest.mark.parametrize("name", MIXTURES)
def test_state_dicts_copies_and_casts_keep_every_bit(name: str, tmp_path: Path) -> None:
    ours = Experts4bit.from_module(experts_of(name, tmp_path))
    inputs = route()
    wanted = ours(*inputs)

    other = copy.deepcopy(ours)
    for _, stack in other.stacks():
        stack.quantize_weight(torch.randn(stack.shape))
    other.load_state_dict(ours.state_dict())
    copies = [other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for made in copies:
        assert torch.equal(made(*inputs), wanted)
        made.to(torch.bfloat16)
        for (_, mine), (_, stack) in zip(ours.stacks(), made.stacks(), strict=True):
            assert torch.equal(mine.weight, stack.weight)
            assert mine.quant_state == stack.quant_state


def test_float_stacks_of_a_state_dict_are_quantized(tmp_path: Path) -> None:
    experts = experts_of("Mixtral", tmp_path)
    ours = Experts4bit.from_module(experts)
    other = copy.deepcopy(ours)
    for _, stack in other.stacks():
        stack.quantize_weight(torch.randn(stack.shape))
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other(*route()), ours(*route()))


# ---- whole models --------------------------------------------------------------------------------


def test_experts_are_loaded_from_a_checkpoint_of_single_ones(tmp_path: Path) -> None:
    """As the Hub has them: transformers fuses them while it loads, and so do we."""
    from safetensors import safe_open

    original = save_family("Qwen 3 MoE", tmp_path / "float")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in file.keys()  # noqa: SIM118
    loaded, _ = load_model(tmp_path / "float")
    report = quantize(original)
    assert "model.layers.1.mlp.experts.down_proj" in report.quantized
    assert torch.equal(logits(loaded), logits(original))
    assert footprint(loaded) == footprint(original.requires_grad_(False))


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_family("Qwen 3 MoE", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.experts.2.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.\d\.down_proj.*shape \[3, 64, 32\]"):
        load_model(tmp_path)


@pytest.mark.parametrize("skip", ["experts", "down_proj", "model.layers.0.mlp.experts.down_proj"])
def test_experts_are_skipped_by_name(skip: str, tmp_path: Path) -> None:
    model = save_family("Mixtral", tmp_path)
    wanted = logits(model)
    report = quantize(model, skip=("lm_head", skip, "self_attn"))
    left = [name for name, _ in quantized_experts(model)]
    whole = skip in ("experts", "down_proj")
    assert left == ([] if whole else ["model.layers.1.mlp.experts"])
    assert "in skip" in report.left["model.layers.0.mlp.experts"]
    assert torch.equal(logits(model), wanted) == whole


def test_experts_that_do_not_begin_with_a_block_are_left(tmp_path: Path) -> None:
    model = save_family("Qwen 3 MoE", tmp_path)
    report = quantize(model, blocksize=4096)
    assert (
        "its matrices have 2048 values, no multiple of blocksize=4096"
        in (report.left["model.layers.0.mlp.experts"])
    )
    assert not list(quantized_experts(model))
    with pytest.raises(ValueError, match=r"experts\.down_proj: its matrices have 2048 values"):
        Experts4bit.from_module(model.model.layers[0].mlp.experts, blocksize=4096)


def test_the_gradient_reaches_below_the_experts(tmp_path: Path) -> None:
    model = save_family("Mixtral", tmp_path)
    quantize(model)
    embedding = model.get_input_embeddings().weight
    model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    assert embedding.grad is not None
    assert embedding.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "shape, bias, error",
    [((8, 8), None, "a stack"), ((2, 8, 8), torch.zeros(8), "bias must be None")],
)
def test_a_stack_of_wrong_parts_is_refused(shape: Any, bias: Any, error: str) -> None:
    from qlora_native.functional import quantize_4bit

    with pytest.raises(ValueError, match=error):
        StackedLinear4bit.from_tensors(*quantize_4bit(torch.randn(shape)), bias)
