"""A quantized Llama with our adapters: equals PEFT on the dequantized base, learns, resumes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_native.adapter import load_adapter, save_adapter
from qlora_native.collate import collate
from qlora_native.config import TrainConfig
from qlora_native.data import Example
from qlora_native.evaluate import evaluate
from qlora_native.loss import OutputHead
from qlora_native.metrics import read_metrics
from qlora_native.model import add_lora, lora_layers, merge, quantize
from qlora_native.train import TrainResult, train
from tiny import examples, make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

R, ALPHA = 4, 8


def make_qlora(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = make_llama(dtype=dtype)
    quantize(model)
    torch.manual_seed(5)
    add_lora(model, **({"r": R, "alpha": ALPHA} | options))
    return model


def make_peft(qlora: nn.Module) -> nn.Module:
    """PEFT's LoRA with the same adapters, on the values that the 4-bit weights stand for."""
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(qlora)
    for _, layer in lora_layers(base):
        layer.lora_B.data.zero_()
    merge(base, torch.float32)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(base, config)
    for name, layer in lora_layers(qlora):
        theirs = model.get_submodule(f"base_model.model.{name}")
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B)
    return model


def config(output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "output": output, "steps": 6, "batch_size": 2, "max_length": 96, "packing": False,
        "learning_rate": 3e-3, "warmup": 0, "schedule": "constant", "checkpoint_every": 0,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def run(
    model: nn.Module, settings: TrainConfig, training: Sequence[Example], **options: Any
) -> TrainResult:
    return train(
        model, settings, training, save_adapter=lambda f: save_adapter(model, f), **options
    )


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r]


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train_plainly(model: nn.Module, settings: TrainConfig, made: Sequence[Example]) -> list[float]:
    """transformers' loss and torch's optimizer in the shortest loop there is."""
    from qlora_native.train import _plan

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    stream = _plan(made, settings, 0).stream()
    found = []
    model.train()
    for _ in range(settings.steps or 0):
        batch = next(stream)
        mask = (batch.example_ids >= 0).long()
        loss = model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("optimizer", ["torch", "adamw"])
def test_equals_peft_on_the_dequantized_base(tmp_path: Path, optimizer: str) -> None:
    made = examples(24)
    settings = config(tmp_path, optimizer=optimizer)
    ours = make_qlora()
    theirs = make_peft(ours)
    their_losses = train_plainly(theirs, settings, made)
    run(ours, settings, made)
    assert losses(tmp_path) == pytest.approx(their_losses, rel=2e-5)
    assert their_losses[-1] < their_losses[0]
    for name, layer in lora_layers(ours):
        module = theirs.get_submodule(f"base_model.model.{name}")
        # Adam divides by the root of a tiny second moment: fp32 rounding of a gradient near zero
        # moves its weight by up to the learning rate. So the distance is measured over the matrix.
        for our, their in (
            (layer.lora_A, module.lora_A["default"].weight),
            (layer.lora_B, module.lora_B["default"].weight),
        ):
            assert (our - their).norm() < 1e-3 * their.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_learns(tmp_path: Path, dtype: torch.dtype, packing: bool, optimizer: str) -> None:
    made = examples(40)
    settings = config(tmp_path, steps=40, packing=packing, optimizer=optimizer, learning_rate=1e-2)
    result = run(make_qlora(dtype), settings, made[:32], held_out=made[32:])
    assert result.before is not None and result.after is not None
    assert result.after.perplexity < 0.5 * result.before.perplexity
    assert result.adapter == tmp_path / "adapter"
    assert json.loads((result.adapter / "adapter_config.json").read_text())["r"] == R


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumes_to_the_bit(tmp_path: Path, optimizer: str, checkpointing: bool) -> None:
    made = examples(24)
    changes: dict[str, Any] = {
        "optimizer": optimizer, "gradient_checkpointing": checkpointing, "checkpoint_every": 3,
        "packing": True, "schedule": "cosine", "keep_checkpoints": 9,
    }  # fmt: skip
    whole, resumed = make_qlora(dropout=0.1), make_qlora(dropout=0.1)
    run(whole, config(tmp_path, **changes), made)
    # As after a kill: the checkpoint of step 3 is the newest, and the model is freshly made.
    (tmp_path / "checkpoints" / "step-000006").rename(tmp_path / "away")
    before = losses(tmp_path)
    result = run(resumed, config(tmp_path, resume=True, **changes), made)
    assert result.steps == 6
    assert losses(tmp_path) == before
    for name, tensor in adapters(whole).items():
        assert torch.equal(tensor, adapters(resumed)[name]), name


def test_a_checkpoint_is_an_adapter(tmp_path: Path) -> None:
    """What is saved gives the same logits when it is loaded onto a fresh base."""
    made = examples(8)
    model = make_qlora()
    result = run(model, config(tmp_path, checkpoint_every=6), made)
    batches = [collate([[e] for e in made], 0, packed=False)]
    wanted = evaluate(model, batches).loss
    fresh = make_llama()
    quantize(fresh)
    assert evaluate(fresh, batches).loss != wanted
    assert result.checkpoint is not None
    for folder in (result.checkpoint, tmp_path / "adapter"):
        load_adapter(fresh, folder)
        assert evaluate(fresh, batches).loss == wanted


def test_gradients_after_an_evaluation_are_right() -> None:
    """train, evaluate, train; then every adapter's gradient against finite differences."""
    made = examples(3)
    batch = collate([[e] for e in made], 0, packed=False)
    model = make_qlora().train()
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.05)
    head = OutputHead.of(model)
    head.token_losses(batch)[0].sum().backward()
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    evaluate(model, [batch])
    with torch.no_grad():
        head.token_losses(batch)
    head.token_losses(batch)[0].sum().backward()

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, first[name]), name
        direction = torch.randn(parameter.shape, generator=generator)
        direction /= direction.norm()
        step = 1e-2
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(head.token_losses(batch)[0].double().sum().item())
                parameter.sub_(direction, alpha=sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        wanted = (parameter.grad * direction).sum().item()
        scale = parameter.grad.norm().item() / parameter.numel() ** 0.5
        assert slope == pytest.approx(wanted, rel=2e-2, abs=5e-2 * scale + 1e-4), name
