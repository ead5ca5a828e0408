"""The loop: it learns, accumulates as one large batch, resumes to the bit, stops when it must."""

from __future__ import annotations

import json
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_native.collate import collate
from qlora_native.config import ConfigError, TrainConfig
from qlora_native.data import Example
from qlora_native.evaluate import evaluate
from qlora_native.loss import OutputHead
from qlora_native.metrics import read_metrics
from qlora_native.progress import Reporter
from qlora_native.schedule import Schedule, warmup_steps
from qlora_native.train import NonFiniteLossError, TrainResult, train
from tiny import add_torch_lora, examples, make_llama, model_with_dropout

pytestmark = pytest.mark.usefixtures("one_thread")


def config(output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "output": output, "steps": 6, "batch_size": 2, "max_length": 96, "optimizer": "torch",
        "learning_rate": 5e-3, "warmup": 2, "checkpoint_every": 0, "plot": False,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def run(output: Path, model: nn.Module | None = None, **changes: Any) -> TrainResult:
    made = examples(40)
    model = model or add_torch_lora(make_llama())
    return train(model, config(output, **changes), made[:32], made[32:])


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_learns(tmp_path: Path) -> None:
    result = run(tmp_path, steps=40, learning_rate=3e-2)
    assert result.before is not None and result.after is not None
    assert result.after.perplexity < 0.5 * result.before.perplexity
    assert result.steps == 40 and result.tokens > 1000 and result.stopped_by is None
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 40]
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["settings"]["learning_rate"] == 3e-2
    assert described["machine"]["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize("packing", [True, False])
def test_two_runs_have_the_same_bits(tmp_path: Path, packing: bool) -> None:
    models = [add_torch_lora(make_llama()) for _ in range(2)]
    for i, model in enumerate(models):
        run(tmp_path / str(i), model, packing=packing)
    assert losses(tmp_path / "0") == losses(tmp_path / "1")
    assert_same_bits(parameters(models[0]), parameters(models[1]))


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    """By tokens, not by batches: the rows below have very unequal numbers of labels."""
    made = sorted(examples(32), key=lambda e: e.labelled)
    models = []
    for rows, micro in ((8, 1), (2, 4), (1, 8)):
        model = add_torch_lora(make_llama())
        settings = config(
            tmp_path / str(micro), batch_size=rows, gradient_accumulation=micro, steps=4,
            packing=False, learning_rate=1e-3,
        )  # fmt: skip
        # One batch of 8 rows must hold the same examples as 4 of 2 rows: so the first 8 only.
        train(model, settings, made[:4] + made[-4:])
        models.append(parameters(model))
    for other in models[1:]:
        for name, tensor in models[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class Stopper(Reporter):
    """Sends this process a signal after a step, as Ctrl-C does."""

    def __init__(self, after: int, number: signal.Signals = signal.SIGINT) -> None:
        self.after, self.number = after, number
        self.said: list[str] = []

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.after:
            signal.raise_signal(self.number)

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("micro", [1, 2])
def test_resuming_has_the_bits_of_not_stopping(tmp_path: Path, micro: int) -> None:
    """With momenta, schedule, dropout and an epoch's end between, after Ctrl-C in step 5 of 12."""
    made = examples(24)
    settings: dict[str, Any] = {"steps": 12, "gradient_accumulation": micro, "eval_every": 4}
    whole, stopped, resumed = (model_with_dropout() for _ in range(3))

    train(whole, config(tmp_path / "a", **settings), made[:20], made[20:])
    reporter = Stopper(after=5)
    at = tmp_path / "b"
    result = train(stopped, config(at, **settings), made[:20], made[20:], reporter=reporter)
    assert result.stopped_by == "SIGINT" and result.steps == 5 and result.after is None
    assert result.checkpoint == at / "checkpoints" / "step-000005"
    assert any("SIGINT: finishing this step" in line for line in reporter.said)
    assert f"Wrote {result.checkpoint}" in reporter.said

    torch.manual_seed(99)  # a new process has another random state
    result = train(resumed, config(at, resume=True, **settings), made[:20], made[20:])
    assert result.steps == 12 and result.before is None
    assert losses(at) == losses(tmp_path / "a")
    evaluations = [
        [(r["step"], r["eval_loss"]) for r in read_metrics(p / "metrics.jsonl") if "eval_loss" in r]
        for p in (tmp_path / "a", at)
    ]
    assert evaluations[0] == evaluations[1]
    assert_same_bits(parameters(whole), parameters(resumed))


def test_terminating_writes_a_checkpoint_too(tmp_path: Path) -> None:
    reporter = Stopper(after=2, number=signal.SIGTERM)
    model = add_torch_lora(make_llama())
    result = train(model, config(tmp_path), examples(8), reporter=reporter)
    assert (result.stopped_by, result.steps) == ("SIGTERM", 2)
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000002"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    model = add_torch_lora(make_llama())
    run(tmp_path, model, checkpoint_every=100)
    before = parameters(model)
    result = run(tmp_path, model, checkpoint_every=100, resume=True)
    assert result.steps == 6 and result.loss is None
    assert_same_bits(parameters(model), before)
    assert len(losses(tmp_path)) == 6


def test_resuming_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    reporter = Stopper(after=-1)
    made = examples(8)
    train(add_torch_lora(make_llama()), config(tmp_path, resume=True), made, reporter=reporter)
    assert any("No checkpoint in" in line for line in reporter.said)


def test_resuming_asks_for_the_same_run(tmp_path: Path) -> None:
    made = examples(16)
    model = add_torch_lora(make_llama())
    train(model, config(tmp_path, checkpoint_every=3), made)
    other = config(tmp_path, resume=True, learning_rate=1e-3, checkpoint_every=1)
    with pytest.raises(ConfigError, match=r"learning_rate: was 0\.005, now 0\.001"):
        train(model, other, made)
    with pytest.raises(ConfigError, match="training data is not the same"):
        train(model, config(tmp_path, resume=True), made[1:])


def test_evaluating_between_changes_nothing(tmp_path: Path) -> None:
    """train, evaluate, train: the peer this is measured against loses its gradients there."""
    plain, evaluated = add_torch_lora(make_llama()), add_torch_lora(make_llama())
    run(tmp_path / "a", plain)
    run(tmp_path / "b", evaluated, eval_every=1)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert_same_bits(parameters(plain), parameters(evaluated))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, recomputed = model_with_dropout(), model_with_dropout()
    run(tmp_path / "a", plain)
    run(tmp_path / "b", recomputed, gradient_checkpointing=True)
    assert recomputed.is_gradient_checkpointing
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name, tensor in parameters(plain).items():
        torch.testing.assert_close(parameters(recomputed)[name], tensor, msg=name)


def test_every_adapter_learns_under_gradient_checkpointing() -> None:
    """Under frozen embeddings the reentrant kind would leave the first layer's without gradient."""
    from qlora_native.train import enable_gradient_checkpointing

    model = add_torch_lora(make_llama()).train()
    enable_gradient_checkpointing(model)
    batch = collate([[e] for e in examples(4)], 0, packed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OutputHead.of(model).token_losses(batch)[0].sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_non_finite_loss_stops_and_names_the_records(tmp_path: Path) -> None:
    made = examples(16)
    model = add_torch_lora(make_llama())
    bad = Example("bad.jsonl:7", (1, 319, 319, 2), (-100, 319, 319, 2))
    with torch.no_grad():
        model.model.embed_tokens.weight[319] = math.inf
    settings = config(tmp_path, steps=30, batch_size=1, packing=False, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError) as caught:
        train(model, settings, [*made, bad])
    message = str(caught.value)
    step = len(losses(tmp_path)) + 1
    assert f"the loss is nan at step {step}, records bad.jsonl:7;" in message
    last = "no checkpoint yet" if step == 1 else f"checkpoints/step-{step - 1:06d}"
    assert last in message
    assert all(torch.isfinite(p).all() for p in parameters(model).values())


def test_a_non_finite_gradient_stops_before_the_step(tmp_path: Path) -> None:
    model = add_torch_lora(make_llama())
    before = parameters(model)
    first = model.model.layers[0].mlp.down_proj
    first.lora_B.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match=r"gradient's norm is (inf|nan) at step 1, rec"):
        run(tmp_path, model)
    assert_same_bits(parameters(model), before)


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    from qlora_native.train import clip_gradients

    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert clip_gradients([parameter], 0) == 6.0
    assert torch.equal(parameter.grad, torch.full((4,), 3.0))
    assert clip_gradients([parameter], 1.0) == 6.0
    assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-5)


def test_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        run(tmp_path, make_llama())
    with pytest.raises(ConfigError, match="training is empty"):
        train(add_torch_lora(make_llama()), config(tmp_path), [])


# ---- evaluation ----


def test_perplexity_and_its_standard_error() -> None:
    model = make_llama()
    made = examples(12)
    packed = evaluate(model, [collate([made[:5], made[5:]], 0, packed=True)])
    by_example = []
    for example in made:
        one = evaluate(model, [collate([[example]], 0, packed=False)])
        assert math.isnan(one.loss_stderr)
        by_example.append((one.loss * one.tokens, one.tokens))
    tokens = sum(n for _, n in by_example)
    mean = sum(nll for nll, _ in by_example) / tokens
    residuals = torch.tensor([nll - mean * n for nll, n in by_example], dtype=torch.float64)
    assert packed.tokens == tokens and packed.examples == 12
    assert packed.loss == pytest.approx(mean, rel=1e-5)
    stderr = float(residuals.std() * 12**0.5 / tokens)
    assert packed.loss_stderr == pytest.approx(stderr, rel=1e-2)
    assert packed.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert packed.perplexity_stderr == pytest.approx(packed.perplexity * stderr, rel=1e-2)


# ---- settings ----


def test_schedules() -> None:
    cosine = Schedule("cosine", 1.0, steps=10, warmup=4)
    assert [cosine(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine(7) == pytest.approx(0.5)
    assert 0 < cosine(9) < 0.1
    linear = Schedule("linear", 1.0, steps=10, warmup=0)
    assert [linear(s) for s in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert {Schedule("constant", 2.0, 10, 0)(s) for s in range(10)} == {2.0}
    assert warmup_steps(0.1, 50) == 5 and warmup_steps(7, 50) == 7 and warmup_steps(70, 50) == 50


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": "two"}, "batch_size must be a whole number, got 'two'"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a number, got nan"),
        ({"schedule": "cosin"}, "schedule must be one of 'cosine', 'linear', 'constant'"),
        ({"blocksize": 48}, "blocksize must be a power of two from 32 to 4096, got 48"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"packing": "yes"}, "packing must be true or false, got 'yes'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"data": 3}, "data must be a list of strings, got 3"),
        ({"group_by_length": True}, "no meaning with packing"),
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_mapping(settings)


def test_settings_as_yaml_writes_them() -> None:
    made = TrainConfig.from_mapping({"learning_rate": "2e-4", "data": "a.jsonl", "epochs": 3})
    assert (made.learning_rate, made.data, made.epochs) == (2e-4, ("a.jsonl",), 3.0)
    assert not made.differences(json.loads(json.dumps(made.as_dict())))
