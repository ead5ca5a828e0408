"""Every family of models that people fine-tune, tiny: loaded in 4 bits, trained, merged, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qlora_native import add_lora, load_adapter, load_model, merge, save_adapter, save_merged
from qlora_native.experts import Experts4bit
from qlora_native.loading import save_quantized
from qlora_native.model import quantized_experts, quantized_layers, trainable_parameters
from qlora_native.optim import AdamW
from tiny_llama import make_tokenizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SMALL: dict[str, Any] = {
    **_HEADS,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}
_ROUTED = {"num_experts_per_tok": 2}

# Name -> kind of config, what is its own, and how many linears a layer has.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama 3": ("llama", {"rope_theta": 5e5}, 7),
    "SmolLM 2": ("llama", {"tie_word_embeddings": True}, 7),
    "SmolLM 3": ("smollm3", {"tie_word_embeddings": True}, 7),
    "Mistral": ("mistral", {"sliding_window": 16}, 7),
    "Qwen 2 and 2.5": ("qwen2", {}, 7),
    "Qwen 3": ("qwen3", {"head_dim": 16}, 7),
    "Gemma 2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}, 7),
    "Gemma 3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
        7,
    ),
    "Phi 3 and 4": ("phi3", {"tie_word_embeddings": False}, 4),
    "Qwen 3 MoE": (
        "qwen3_moe",
        {**_ROUTED, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32},
        4,
    ),
    "Mixtral": ("mixtral", {**_ROUTED, "num_local_experts": 4}, 4),
    "gpt-oss": ("gpt_oss", {**_ROUTED, "head_dim": 16, "num_local_experts": 4}, 4),
}
MIXTURES = ("Qwen 3 MoE", "Mixtral", "gpt-oss")


def save_family(name: str, folder: Path) -> Any:
    """A random model of the family, saved as transformers does; experts one by one, then."""
    kind, own, _ = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **{**_SMALL, **own})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def batch() -> Tensor:
    return torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))


def names_in(folder: Path) -> set[str]:
    """Names of the tensors that a folder's one file holds."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=batch(), use_cache=False).logits
    return result


def train(model: Any, steps: int = 4) -> list[float]:
    optimizer = AdamW(trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=batch(), labels=batch(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_from_its_checkpoint_to_a_merged_one(name: str, tmp_path: Path) -> None:
    *_, linears = FAMILIES[name]
    original = save_family(name, tmp_path / "float")

    model, tokenizer = load_model(tmp_path / "float")
    assert len(list(quantized_layers(model))) == 2 * linears
    assert len(list(quantized_experts(model))) == (2 if name in MIXTURES else 0)
    base = logits(model)
    assert (base - logits(original)).norm() < 0.5 * logits(original).norm()

    # The same folder, quantized, says the same.
    save_quantized(model, tokenizer, tmp_path / "packed")
    assert torch.equal(logits(load_model(tmp_path / "packed")[0]), base)

    add_lora(model, r=4, alpha=8)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert not torch.equal(trained, base)

    # The adapter, on a base that is loaded again.
    save_adapter(model, tmp_path / "adapter")
    again, _ = load_model(tmp_path / "packed")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)

    # Merged, as transformers reads it.
    save_merged(model, tokenizer, tmp_path / "merged", dtype=torch.float32, prompts=())
    assert names_in(tmp_path / "merged") == names_in(tmp_path / "float")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    merge(model, torch.float32)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, Experts4bit) for module in model.modules())
