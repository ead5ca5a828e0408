"""Evaluation: perplexity of held-out examples, with the standard error that a small set brings.

The mean loss is sum(nll) / sum(tokens) over examples. Tokens of one example depend on each other,
so the standard error takes the example as the unit (the ratio estimator's): with residuals
e_i = nll_i - mean * tokens_i over n examples,

    se(mean) = sqrt(n / (n - 1) * sum(e_i²)) / sum(tokens),   se(perplexity) = perplexity * se(mean)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_native.collate import Batch
from qlora_native.loss import OutputHead


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a token, and what follows from it."""

    loss: float
    loss_stderr: float  # nan with a single example
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def perplexity_stderr(self) -> float:
        return self.perplexity * self.loss_stderr


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    head: OutputHead | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates `model` (in eval mode, restored afterwards) on the labelled tokens of `batches`.

    `advance(done, batches)` is called after each batch.
    """
    if not batches:
        raise ValueError("batches is empty: nothing to evaluate on")
    head = head or OutputHead.of(model)
    training = model.training
    model.eval()
    sums: list[float] = []
    counts: list[int] = []
    try:
        for done, batch in enumerate(batches, start=1):
            losses, where = head.token_losses(batch)
            example = batch.example_ids[where.cpu()]
            size = len(batch.origins)
            by_example = torch.zeros(size, dtype=torch.float64)
            by_example.index_add_(0, example, losses.double().cpu())
            sums += by_example.tolist()
            counts += torch.bincount(example, minlength=size).tolist()
            if advance is not None:
                advance(done, len(batches))
    finally:
        model.train(training)
    tokens = sum(counts)
    mean = sum(sums) / tokens
    n = len(sums)
    squares = sum((nll - mean * count) ** 2 for nll, count in zip(sums, counts, strict=True))
    stderr = math.sqrt(n / (n - 1) * squares) / tokens if n > 1 else math.nan
    return Evaluation(loss=mean, loss_stderr=stderr, tokens=tokens, examples=n)
