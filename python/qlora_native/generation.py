"""Text from a model: a prompt or a conversation in, an answer out, piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.loading.hf import hf

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most likely one (greedy)."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> Tensor:
    """Token ids [1, T] of a conversation by the chat template, ready for the next answer.

    Raises ValueError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: this is no chat model, give it a raw prompt"
        )
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return _as_ids(tokenizer(text, add_special_tokens=False))


def encode_raw(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids [1, T] of `prompt`, which the model continues."""
    return _as_ids(tokenizer(prompt))


def generate(
    model: nn.Module,
    tokenizer: Any,
    input_ids: Tensor,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue `input_ids` [1, T] and return the new text, which `on_text` receives as it comes.

    The same seed gives the same text; the global random state is left as it was.

    Raises ValueError if the prompt is empty or leaves no room in the model's context.
    """
    streamer: Any = hf().TextStreamer

    class Listener(streamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            if on_text is not None and text:
                on_text(text)

    pieces: list[str] = []
    room = _room(model, input_ids)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampling.seed)
            model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(sampling.max_new_tokens, room),
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
                streamer=Listener(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **choice,
            )
    finally:
        model.train(training)
    return "".join(pieces)


def _as_ids(encoded: Any) -> Tensor:
    return torch.tensor([encoded["input_ids"]], dtype=torch.int64)


def _room(model: nn.Module, input_ids: Tensor) -> int:
    """Tokens that still fit into the model's context behind the prompt."""
    length = input_ids.shape[1]
    if length == 0:
        raise ValueError("the prompt is empty: there is nothing to continue")
    context = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return 2**31
    if length >= context:
        raise ValueError(
            f"the prompt has {length} tokens and the model's context {context}: shorten the prompt"
        )
    return context - length
