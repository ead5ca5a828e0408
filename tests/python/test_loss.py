"""The chunked loss equals transformers' loss and gradient, and holds no whole logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_native.collate import Batch, collate
from qlora_native.data import IGNORE
from qlora_native.loss import OutputHead, chunked_cross_entropy
from tiny import add_torch_lora, examples, make_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(count: int = 6) -> Batch:
    return collate([[e] for e in examples(count)], pad_id=0, packed=False)


def plain_loss(model: nn.Module, made: Batch) -> Tensor:
    """transformers' own: the mean over the labelled tokens."""
    mask = (made.example_ids >= 0).long()
    return model(input_ids=made.input_ids, attention_mask=mask, labels=made.labels).loss


def losses_and_gradients(
    model: nn.Module, made: Batch, chunk: int = 128
) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    head = OutputHead.of(model)
    ours = head.token_losses(made, chunk)[0].sum() / made.labelled
    ours.backward()
    our_gradients = take(model)
    theirs = plain_loss(model, made)
    theirs.backward()
    return ours.detach(), our_gradients, theirs.detach(), take(model)


def take(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_transformers(dtype: torch.dtype, chunk: int) -> None:
    model = add_torch_lora(make_llama(dtype=dtype))
    ours, our_gradients, theirs, their_gradients = losses_and_gradients(model, batch(), chunk)
    # bf16: the head's products are rounded to 8 bits in both, in another order.
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)
    for name, gradient in their_gradients.items():
        error = (our_gradients[name] - gradient).norm() / gradient.norm()
        assert error < rtol, f"{name}: {error:.2e}"


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    targets = torch.tensor([0, 8, 3, 3, 1])
    upstream = torch.randn(5, dtype=torch.float64)

    def reference(h: Tensor) -> Tensor:
        return nn.functional.cross_entropy(h @ weight.T + bias, targets, reduction="none")

    assert torch.autograd.gradcheck(reference, (hidden,))
    (wanted,) = torch.autograd.grad(reference(hidden), hidden, upstream)
    losses = chunked_cross_entropy(hidden, weight, bias, targets, 2)
    (got,) = torch.autograd.grad(losses, hidden, upstream.float())
    torch.testing.assert_close(losses.double(), reference(hidden), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    losses = chunked_cross_entropy(hidden, weight, None, torch.tensor([0, 0]), 64)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([0.0, 600.0]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [-2.0]]))


def test_a_non_finite_hidden_state_gives_a_non_finite_loss() -> None:
    hidden = torch.tensor([[float("nan")], [float("inf")], [1.0]])
    losses = chunked_cross_entropy(
        hidden, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([0, 0, 0]), 64
    )
    assert losses.isfinite().tolist() == [False, False, True]


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any op's result has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_never_holds_more_than_a_chunk_of_logits() -> None:
    model = add_torch_lora(make_llama(vocab_size=5000, intermediate_size=64))
    made = batch(8)
    head = OutputHead.of(model)
    with LargestTensor() as ours:
        head.token_losses(made, 16)[0].sum().backward()
    with LargestTensor() as theirs:
        plain_loss(model, made).backward()
    head_weight = 5000 * 64  # the head itself, transposed views of it
    assert ours.largest <= max(head_weight, 16 * 5000)
    assert theirs.largest >= made.input_ids.numel() * 5000


def test_batch_without_a_single_label() -> None:
    made = batch(2)
    empty = Batch(
        made.input_ids, torch.full_like(made.labels, IGNORE), None, made.example_ids,
        made.origins, made.tokens, 0,
    )  # fmt: skip
    losses, where = OutputHead.of(make_llama()).token_losses(empty)
    assert losses.shape == (0,) and not where.any()


def other_model(kind: str) -> nn.Module:
    import transformers as hf

    shared = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "gemma2":
        config = hf.Gemma2Config(
            **shared, head_dim=16, final_logit_softcapping=2.0, attn_implementation="eager"
        )
        return hf.Gemma2ForCausalLM(config)
    if kind == "granite":
        return hf.GraniteForCausalLM(hf.GraniteConfig(**shared, logits_scaling=3.0))
    if kind == "cohere":
        return hf.CohereForCausalLM(hf.CohereConfig(**shared, logit_scale=0.25))
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "gpt2"])
def test_models_that_change_their_logits(kind: str) -> None:
    model = other_model(kind).requires_grad_(False).eval()
    lora = add_torch_lora(model) if kind != "gpt2" else model
    if kind == "gpt2":
        model.transformer.ln_f.weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OutputHead.of(lora).decoder is not None
    ours, our_gradients, theirs, their_gradients = losses_and_gradients(lora, batch(3), 16)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_trained_head_gets_its_gradient() -> None:
    model = add_torch_lora(make_llama())
    model.lm_head.weight.requires_grad_(True)
    ours, our_gradients, theirs, their_gradients = losses_and_gradients(model, batch(3), 16)
    assert "lm_head.weight" in our_gradients
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_unknown_logits_fall_back_and_say_so() -> None:
    model = add_torch_lora(make_llama())
    forward = model.forward

    def odd(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = out.logits * 1.7
        return out

    model.forward = odd  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="LlamaForCausalLM: its logits are not simply head"):
        head = OutputHead.of(model)
    made = batch(3)
    losses, where = head.token_losses(made)
    logits = model(input_ids=made.input_ids, use_cache=False).logits
    targets = made.labels[:, 1:][made.labels[:, 1:] != IGNORE]
    wanted = nn.functional.cross_entropy(
        logits[:, :-1][made.labels[:, 1:] != IGNORE], targets, reduction="none"
    )
    torch.testing.assert_close(losses, wanted)
    assert int(where.sum()) == made.labelled


def test_peft_models_are_seen_through() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = OutputHead.of(model)
    assert type(head.decoder).__name__ == "LlamaModel"
    ours, _, theirs, _ = losses_and_gradients(model, batch(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
