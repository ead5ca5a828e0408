"""Loss: cross-entropy of the labelled tokens alone, without ever holding all logits.

The logits of a batch, [tokens, vocabulary] in fp32, are often larger than everything else in the
step. Two things make them small: only the hidden states whose next token has a label go through
the output head, and they go through it in chunks. Since the head is frozen, the gradient with
respect to the hidden states is all that the backward pass needs, and a chunk's gradient follows
from its logits while they are there:

    loss_i = logsumexp(z_i) - z_i[y_i],   z = h Wᵀ (+ b)
    d loss_i / d h_i = (softmax(z_i) - onehot(y_i)) W

so nothing is computed twice and only [tokens, hidden] is kept for the backward pass.

Models differ in what they do between head and logits (a scale, a soft cap). `OutputHead.of` knows
these, and proves its knowledge by comparing with the model's own logits once; where that fails, or
where the head itself is trained, the plain logits are used, and a warning says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qlora_native.collate import Batch
from qlora_native.data import IGNORE

# Tokens whose logits stand at once: 24 MiB in fp32 at a vocabulary of 49152. Loss and gradient of
# 1024 tokens, head [49152, 576], Zen 4, one thread, CPU seconds in bf16 / fp32, 2026-11-24: chunks
# of 32 1.21 / 2.26, 64 0.94 / 1.86, 128 0.81 / 1.55, 256 0.80 / 1.50; whole 1.19 / 1.77 (torch).
CHUNK = 128


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses [n] fp32 of hidden [n, H] against targets [n], for a frozen head [V, H]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        for begin in range(0, len(targets), chunk):
            part = slice(begin, begin + chunk)
            index = targets[part, None]
            logits = functional.linear(hidden[part], weight, bias).float()
            target_logit = logits.gather(1, index)
            highest = logits.amax(1, keepdim=True)
            exps = logits.sub_(highest).exp_()
            total = exps.sum(1, keepdim=True)
            losses[part] = (total.log() + highest - target_logit)[:, 0]
            if grad is not None:
                # total * (softmax - onehot), in fp32: it cancels where the model is sure.
                difference = exps.scatter_add_(1, index, -total)
                torch.mm(difference.to(weight.dtype), weight, out=grad[part])
                grad[part] /= total
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0][:, None].to(grad.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Cross-entropy [n] fp32 of softmax(hidden [n, H] weightᵀ [H, V] + bias) against targets [n].

    The gradient goes to `hidden` alone: `weight` and `bias` are taken as frozen.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk)  # type: ignore[no-untyped-call]
    return losses


@dataclass(frozen=True)
class OutputHead:
    """How a causal language model comes from hidden states to logits."""

    model: nn.Module
    decoder: nn.Module | None  # None: only the model's own logits can be trusted
    head: nn.Module | None
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: nn.Module) -> OutputHead:
        """Finds the decoder and the head, and checks them against the model's own logits."""
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        found = _parts(inner)
        if found is not None and _agrees(inner, found):
            return found
        warnings.warn(
            f"{type(inner).__name__}: its logits are not simply head(decoder(x)), so the loss is "
            "computed from whole logits, which takes more memory",
            stacklevel=2,
        )
        return OutputHead(model, None, None)

    def token_losses(self, batch: Batch, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
        """Losses [n] fp32 of the labelled tokens in row-major order, and where: bool [B, T]."""
        device = next(self.model.parameters()).device
        # Position t predicts token t + 1. A packed example's first token carries no label, so
        # nothing is predicted across an example's edge.
        labels = batch.labels.to(device)
        where = labels != IGNORE
        where[:, 0] = False
        targets = labels[where]
        predicting = where.roll(-1, dims=1)
        inputs = batch.inputs(device)
        if self.decoder is None or self.head is None:
            logits = self.model(**inputs).logits[predicting]
            return functional.cross_entropy(logits.float(), targets, reduction="none"), where
        hidden = self.decoder(**inputs)[0][predicting]
        if type(self.head) is nn.Linear and self._is_frozen_and_plain():
            weight, bias = self.head.weight, self.head.bias
            return chunked_cross_entropy(hidden, weight, bias, targets, chunk), where
        parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        losses = [checkpoint(self._chunk_losses, h, y, use_reentrant=False) for h, y in parts]
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32), where

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.head is not None
        logits: Tensor = self.head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _is_frozen_and_plain(self) -> bool:
        assert self.head is not None
        trained = any(p.requires_grad for p in self.head.parameters())
        return not trained and self.scale == 1.0 and self.softcap is None

    def _chunk_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(hidden).float(), targets, reduction="none")


def _parts(model: Any) -> OutputHead | None:
    """The decoder and the head by transformers' conventions, with the config's logit transforms."""
    if not (hasattr(model, "get_decoder") and hasattr(model, "get_output_embeddings")):
        return None
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or head is None or decoder is model:
        return None
    config = getattr(model, "config", None)
    scale = 1.0
    # Granite divides by logits_scaling; Cohere and Falcon-H1 multiply.
    if isinstance(divisor := getattr(config, "logits_scaling", None), float | int):
        scale /= divisor
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(factor := getattr(config, name, None), float | int):
            scale *= factor
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(model, decoder, head, scale, softcap)


@torch.no_grad()
def _agrees(model: Any, head: OutputHead) -> bool:
    """Whether head(decoder(x)) gives the model's logits on three tokens."""
    assert head.decoder is not None
    training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    try:
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        got = head.logits(head.decoder(input_ids=ids, use_cache=False)[0]).float()
    finally:
        model.train(training)
    return got.shape == wanted.shape and torch.allclose(
        got, wanted, rtol=1e-2, atol=1e-3, equal_nan=True
    )
