"""Collate: examples become batches, padded or packed, in an order that is a function of the seed.

padding   a row is one example, padded on the right. No attention mask is needed: under a causal
          mask no real token sees what stands to its right, padding has no label, and without a
          mask scaled_dot_product_attention takes its fastest path (is_causal).
packing   a row is several whole examples, one after another, at most `max_length` tokens. Each
          example's positions start again at 0; from that, and from the absence of a mask,
          transformers (>= 4.53) builds the block-diagonal causal mask, together with whatever else
          the layer asks for (sliding windows). No example sees another: `check_isolation` proves it
          on the model at hand, and the tests, that packed and separate give the same gradients.

BatchPlan lays out every epoch: which examples share a row, which rows a batch. It is a pure
function of (examples, settings, seed, epoch), so a resumed run needs the step's number alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.data import IGNORE, Example

# Rows that are sorted by length together before they are cut into batches, in batches.
_LENGTH_WINDOW = 32


@dataclass(frozen=True)
class Batch:
    """One forward pass: B rows of T tokens."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, IGNORE where nothing is learned; not shifted
    position_ids: Tensor | None  # [B, T] int64 when packed, else None: 0 … T-1 in every row
    # [B, T] int64: the index into `origins` of the example a token belongs to; -1 for padding.
    example_ids: Tensor
    origins: tuple[str, ...]
    tokens: int  # without padding
    labelled: int

    def inputs(self, device: torch.device | str | None = None) -> dict[str, Any]:
        """What the decoder takes; the labels stay apart."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids.to(device), "use_cache": False}
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids.to(device)
        return inputs


def collate(rows: Sequence[Sequence[Example]], pad_id: int, packed: bool) -> Batch:
    """Lays out rows of examples; unpacked rows hold one example each."""
    if not packed and any(len(row) != 1 for row in rows):
        raise ValueError("an unpacked row holds exactly one example")
    width = max(sum(len(example.input_ids) for example in row) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    example_ids = torch.full(shape, -1)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    origins: list[str] = []
    for r, row in enumerate(rows):
        begin = 0
        for example in row:
            end = begin + len(example.input_ids)
            input_ids[r, begin:end] = torch.tensor(example.input_ids)
            labels[r, begin:end] = torch.tensor(example.labels)
            example_ids[r, begin:end] = len(origins)
            position_ids[r, begin:end] = torch.arange(end - begin)
            origins.append(example.origin)
            begin = end
        position_ids[r, begin:] = torch.arange(width - begin)  # padding: an example of its own
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids if packed else None,
        example_ids=example_ids,
        origins=tuple(origins),
        tokens=int((example_ids >= 0).sum()),
        labelled=int((labels != IGNORE).sum()),
    )


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in rows of at most `max_length` tokens.

    The number of rows depends on the lengths alone, not on their order.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > max_length:
            raise ValueError(f"an example has {length} tokens, max_length is {max_length}")
        best = bisect_left(room, (length, -1))
        if best < len(room):
            free, row = room.pop(best)
            rows[row].append(index)
        else:
            free, row = max_length, len(rows)
            rows.append([index])
        insort(room, (free - length, row))
    return rows


@dataclass(frozen=True)
class BatchPlan:
    """Which examples make up which batch, for every epoch."""

    examples: Sequence[Example]
    batch_size: int  # rows
    max_length: int
    packing: bool
    group_by_length: bool
    pad_id: int
    seed: int

    def batches_per_epoch(self) -> int:
        rows = len(self.examples)
        if self.packing:
            rows = len(pack([len(e.input_ids) for e in self.examples], self.max_length))
        return -(-rows // self.batch_size)

    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """Batches of rows of example indices, shuffled by (seed, epoch)."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)

        def shuffled(n: int) -> list[int]:
            order: list[int] = torch.randperm(n, generator=generator).tolist()
            return order

        order = shuffled(len(self.examples))
        if self.packing:
            lengths = [len(self.examples[i].input_ids) for i in order]
            rows = [[order[i] for i in row] for row in pack(lengths, self.max_length)]
            rows = [rows[i] for i in shuffled(len(rows))]
        else:
            rows = [[i] for i in order]
        if self.group_by_length and not self.packing:
            rows = self._sorted_in_windows(rows)
        batches = [
            rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)
        ]
        return [batches[i] for i in shuffled(len(batches))]

    def _sorted_in_windows(self, rows: list[list[int]]) -> list[list[int]]:
        window = self.batch_size * _LENGTH_WINDOW
        ordered: list[list[int]] = []
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            ordered += sorted(part, key=lambda row: len(self.examples[row[0]].input_ids))
        return ordered

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """Batches start, start + 1, … over epoch after epoch, without end."""
        per_epoch = self.batches_per_epoch()
        epoch, offset = divmod(start, per_epoch)
        while True:
            for rows in self.epoch(epoch)[offset:]:
                yield self._collate(rows)
            epoch, offset = epoch + 1, 0

    def in_order(self) -> list[Batch]:
        """Every example once, in the order given: for evaluation."""
        if self.packing:
            rows = pack([len(e.input_ids) for e in self.examples], self.max_length)
        else:
            rows = self._by_length()
        return [
            self._collate(rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        ]

    def _by_length(self) -> list[list[int]]:
        order = range(len(self.examples))
        return [[i] for i in sorted(order, key=lambda i: len(self.examples[i].input_ids))]

    def _collate(self, rows: Sequence[Sequence[int]]) -> Batch:
        chosen = [[self.examples[i] for i in row] for row in rows]
        return collate(chosen, self.pad_id, self.packing)


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Raises ValueError unless `model` keeps packed examples apart.

    Runs two packed rows whose second example is the same and whose first one is not: the second's
    logits differ in a model that ignores `position_ids` (or carries a state along the row). Rows of
    one shape are compared, not a packed example with one alone: in 16 bits another shape is
    rounded otherwise, and some tokens of real models (untrained ones) make much of that.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = torch.tensor([[0, 1, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    one, other = (
        model(input_ids=row[None], position_ids=positions, use_cache=False).logits[0, 3:].float()
        for row in rows
    )
    model.train(training)
    difference = (one - other).abs().max()
    scale = one.abs().max()
    # Logits that are not numbers tell nothing here; the loss will tell.
    if torch.isfinite(difference + scale) and difference > 0.05 * scale:
        raise ValueError(
            "packing would let examples see each other in this model: the logits of an example "
            f"differ by {difference:.3g} (of {scale:.3g}) with what stands before it in its row; "
            "set packing to false"
        )
