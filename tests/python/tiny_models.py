"""Small models made on the fly, for tests: no file, no network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_native.model import lora_layers, quantize


class Mlp(nn.Module):
    """Two blocks of two linears between an embedding and a head; transformers is not needed."""

    def __init__(self, width: int = 32, vocabulary: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"up_proj": nn.Linear(width, 2 * width), "down_proj": nn.Linear(2 * width, width)}
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[i]
        return x + layer["down_proj"](torch.tanh(layer["up_proj"](x)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for i in range(len(self.layers)):
            x = self.block(i, x)
        return self.lm_head(x)


def tiny_llama(**changes: Any) -> nn.Module:
    """A Llama of two layers, grouped-query attention, tied embeddings, fp32."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**settings, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def some_ids(rows: int = 2, length: int = 12, vocabulary: int = 128) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


LLAMA_LINEARS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    )
]


def quantized_mlp(**options):
    torch.manual_seed(0)
    model = Mlp()
    quantize(model, **options)
    return model


def shake_adapters(model, std=0.05):
    """Adapters that do something: lora_B is zero at first."""
    torch.manual_seed(7)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=std)
