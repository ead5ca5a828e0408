"""Batches: padding and packing keep examples apart; the plan is a function of seed and epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlora_native.collate import BatchPlan, check_isolation, collate, pack
from qlora_native.data import IGNORE
from qlora_native.loss import OutputHead
from tiny import add_torch_lora, examples, make_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(count: int = 30, **changes: Any) -> BatchPlan:
    settings: dict[str, Any] = {
        "batch_size": 3, "max_length": 160, "packing": True, "group_by_length": False,
        "pad_id": 0, "seed": 0,
    }  # fmt: skip
    return BatchPlan(examples=examples(count), **(settings | changes))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_padding_is_laid_out_on_the_right() -> None:
    made = examples(3)
    batch = collate([[e] for e in made], pad_id=9, packed=False)
    for row, example in enumerate(made):
        n = len(example.input_ids)
        assert tuple(batch.input_ids[row, :n].tolist()) == example.input_ids
        assert (batch.input_ids[row, n:] == 9).all()
        assert (batch.labels[row, n:] == IGNORE).all()
        assert (batch.example_ids[row] == row).sum() == n
    assert batch.position_ids is None
    assert batch.tokens == sum(len(e.input_ids) for e in made)
    assert batch.labelled == sum(e.labelled for e in made)


def test_packed_positions_start_again() -> None:
    made = examples(4)
    batch = collate([made[:3], made[3:]], pad_id=0, packed=True)
    assert batch.position_ids is not None
    begin = 0
    for example in made[:3]:
        end = begin + len(example.input_ids)
        assert batch.position_ids[0, begin:end].tolist() == list(range(end - begin))
        begin = end
    assert batch.origins == tuple(e.origin for e in made)
    assert batch.tokens == sum(len(e.input_ids) for e in made)


def test_unpacked_rows_hold_one_example() -> None:
    with pytest.raises(ValueError, match="exactly one example"):
        collate([examples(2)], pad_id=0, packed=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [{}, {"sliding": True}], ids=["llama", "sliding-window"])
def test_packed_equals_separate(attention: str, changes: dict[str, bool]) -> None:
    """Losses and gradients of packed rows are those of each example alone."""
    if changes:
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8, pad_token_id=0,
            attn_implementation=attention,
        )  # fmt: skip
        model: nn.Module = MistralForCausalLM(config).requires_grad_(False)
    else:
        model = make_llama(attn_implementation=attention)
    model = add_torch_lora(model.double())
    for p in model.parameters():
        p.data = p.data.double()
    head = OutputHead.of(model)
    made = examples(7)
    packed = collate([made[:4], made[4:]], pad_id=0, packed=True)
    losses, _ = head.token_losses(packed)
    losses.sum().backward()
    together = gradients(model)

    apart = []
    for example in made:
        one, _ = head.token_losses(collate([[example]], pad_id=0, packed=False))
        one.sum().backward()
        apart.append(one.detach())
    torch.testing.assert_close(losses.detach(), torch.cat(apart), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        # transformers' norms and eager softmax compute in fp32, whatever the model's dtype.
        assert (together[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_padded_equals_separate() -> None:
    model = add_torch_lora(make_llama())
    head = OutputHead.of(model)
    made = examples(5)
    head.token_losses(collate([[e] for e in made], 0, packed=False))[0].sum().backward()
    together = gradients(model)
    for example in made:
        head.token_losses(collate([[example]], 0, packed=False))[0].sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_isolation_check_knows_a_model_that_leaks() -> None:
    model = make_llama()
    check_isolation(model)

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Any, position_ids: Any = None, **others: Any) -> Any:
            return self.inner(input_ids=input_ids, **others)

    with pytest.raises(ValueError, match="let examples see each other"):
        check_isolation(Leaky())


@given(st.lists(st.integers(1, 50), max_size=80))
def test_packing_places_each_once_within_the_row(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert len(rows) == len(pack(lengths[::-1], 50))
    # Best fit opens a row only when no open one has room, so at most one is half empty or less.
    assert sum(2 * sum(lengths[i] for i in row) <= 50 for row in rows) <= 1


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="has 51 tokens, max_length is 50"):
        pack([3, 51], 50)


@pytest.mark.parametrize(
    "changes", [{}, {"packing": False}, {"packing": False, "group_by_length": True}]
)
def test_an_epoch_holds_every_example_once(changes: dict[str, bool]) -> None:
    made = plan(**changes)
    for epoch in range(3):
        seen = Counter(i for batch in made.epoch(epoch) for row in batch for i in row)
        assert seen == Counter(range(30))
        assert len(made.epoch(epoch)) == made.batches_per_epoch()
    assert made.epoch(0) != made.epoch(1)
    assert made.epoch(1) == plan(**changes).epoch(1)
    assert made.epoch(0) != plan(seed=1, **changes).epoch(0)


def test_the_stream_can_begin_anywhere() -> None:
    made = plan()
    per_epoch = made.batches_per_epoch()
    whole = made.stream()
    firsts = [next(whole).origins for _ in range(2 * per_epoch + 1)]
    for start in (1, per_epoch, per_epoch + 1, 2 * per_epoch):
        assert next(made.stream(start)).origins == firsts[start]


def test_length_grouping_pads_less() -> None:
    def padding(made: BatchPlan) -> int:
        batches = [next(made.stream(i)) for i in range(made.batches_per_epoch())]
        return sum(b.input_ids.numel() - b.tokens for b in batches)

    grouped = padding(plan(60, packing=False, group_by_length=True))
    assert grouped < padding(plan(60, packing=False)) / 2
