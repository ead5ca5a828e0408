"""What merging adapters into the stored weights costs: by the weights, and by what the model says.

weights   ||stored - (W + D)|| / ||W + D||, Frobenius; W the base's values, D = scaling * B A
model     KL(p || q) in nats a token, of the next-token distributions p with adapters, q as stored
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_native.lora import QLoRALinear

Model = Any  # transformers.PreTrainedModel; transformers is optional and has no strict types


@dataclass(frozen=True)
class MergeReport:
    """What was merged and what it cost; norms are over all merged weights taken as one.

    relative_change     ||D|| / ||W||: what the adapters had changed
    kept                <stored - W, D> / ||D||^2: how much of that is there still; 1 is all, and
                        rounding to the nearest 4-bit values leaves little (requantize.py)
    relative_error      ||stored - (W + D)|| / ||W + D||: what rounding changed
    worst, worst_error  the layer with the largest of the latter
    kl                  nats a token, the mean over `tokens`
    same_top            share of the tokens after which both rank the same token first
    tokens              0 without prompts; kl and same_top are then nan
    """

    layers: int
    relative_change: float
    kept: float
    relative_error: float
    worst: str
    worst_error: float
    kl: float
    same_top: float
    tokens: int

    def __str__(self) -> str:
        text = (
            f"{self.layers} layers merged: the adapters changed the weights by "
            f"{self.relative_change:.2%}, of which {self.kept:.0%} is kept; rounding changed them "
            f"by {self.relative_error:.2%} (at most {self.worst_error:.2%}, {self.worst})"
        )
        if self.tokens:
            text += (
                f"; over {self.tokens} tokens the KL divergence is {self.kl:.2e} nats a token, and "
                f"the first choice the same at {self.same_top:.1%}"
            )
        return text


@dataclass
class WeightCost:
    """Squared norms, summed over the merged weights."""

    layers: int = 0
    base: float = 0.0
    change: float = 0.0
    kept: float = 0.0
    merged: float = 0.0
    error: float = 0.0
    worst: str = ""
    worst_error: float = 0.0

    def add(self, name: str, layer: QLoRALinear, merged: Tensor, stored: Tensor) -> None:
        """Count one weight: `merged` exact in fp32, `stored` what the folder will hold of it."""
        base = layer.dequantize(torch.float32)
        change = merged - base
        error, norm = _squared(stored.float() - merged), _squared(merged)
        self.layers += 1
        self.base += _squared(base)
        self.change += _squared(change)
        self.kept += float(torch.sum((stored.float() - base) * change, dtype=torch.float64))
        self.merged += norm
        self.error += error
        if _ratio(error, norm) >= self.worst_error:
            self.worst, self.worst_error = name, _ratio(error, norm)

    def report(self, kl: float, same_top: float, tokens: int) -> MergeReport:
        """The report, with what `divergence` found."""
        return MergeReport(
            self.layers,
            _ratio(self.change, self.base),
            self.kept / self.change if self.change else 1.0,
            _ratio(self.error, self.merged),
            self.worst,
            self.worst_error,
            kl,
            same_top,
            tokens,
        )


@torch.no_grad()
def log_probabilities(model: Model, inputs: Sequence[Tensor]) -> list[Tensor]:
    """log p of the next token after each token of each input [1, T], fp32 [T, vocabulary]."""
    training = model.training
    model.eval()
    try:
        return [model(ids).logits[0].float().log_softmax(-1) for ids in inputs]
    finally:
        model.train(training)


def divergence(p: Sequence[Tensor], q: Sequence[Tensor]) -> tuple[float, float, int]:
    """Mean KL(p || q) in nats, share of the same first choices, number of tokens."""
    tokens = sum(len(log_p) for log_p in p)
    if tokens == 0:
        return math.nan, math.nan, 0
    kl = same = 0.0
    for log_p, log_q in zip(p, q, strict=True):
        kl += float((log_p.exp().double() * (log_p.double() - log_q.double())).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return kl / tokens, same / tokens, tokens


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _ratio(squared: float, of: float) -> float:
    return math.sqrt(squared / of) if of else 0.0
