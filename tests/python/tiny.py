"""A language model and a tokenizer small enough to make on the fly, and data to train them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "sang",
    "on",
    "under",
    "tree",
    "and",
    "then",
]


def make_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer with ChatML's special tokens; 300 tokens, trained in 10 ms."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A 2-layer Llama with grouped queries; frozen, so that only adapters train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,  # under a frozen head, smaller logits could not be sure of much
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype)
    return model.requires_grad_(False)


def add_torch_lora(model: nn.Module, r: int = 4, seed: int = 1) -> nn.Module:
    """Adapters of plain torch modules, for tests of the loop that need none of the kernels."""
    torch.manual_seed(seed)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_proj"):
                setattr(module, name, TorchLoRA(child, r))
    return model


class TorchLoRA(nn.Module):
    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, r) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.lora_A.T.to(x.dtype)) @ self.lora_B.T.to(x.dtype)


class DroppingOut(nn.Module):
    """Draws from torch's random state in each pass, as dropout does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(nn.functional.dropout(x, 0.2, self.training))


def model_with_dropout() -> nn.Module:
    model = add_torch_lora(make_llama())
    for layer in model.model.layers:
        layer.mlp.down_proj = DroppingOut(layer.mlp.down_proj)
    return model


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with answers that can be learned: the question's words, backwards."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        words = [WORDS[i] for i in picks]
        records.append(
            {
                "messages": [
                    {"role": "user", "content": " ".join(words)},
                    {"role": "assistant", "content": " ".join(reversed(words))},
                ]
            }
        )
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def examples(count: int = 40, seed: int = 0, max_length: int = 64) -> list[Any]:
    """Tokenized conversations."""
    from qlora_native.data import tokenize
    from qlora_native.records import Record

    records = [
        Record(f"made.jsonl:{i + 1}", messages=tuple(r["messages"]))
        for i, r in enumerate(conversations(count, seed))
    ]
    return tokenize(records, make_tokenizer(), max_length=max_length)[0]
