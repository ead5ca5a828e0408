"""The loop with a paged optimizer: the same bits, figures in the log, and one more try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_native.collate import Batch
from qlora_native.config import ConfigError, TrainConfig
from qlora_native.loss import OutputHead
from qlora_native.metrics import read_metrics
from qlora_native.progress import Reporter, describe, describe_paging
from qlora_native.train import TrainResult, train
from tiny import examples, model_with_dropout

pytestmark = pytest.mark.usefixtures("one_thread")

PAGED = {
    "optimizer": "paged_adamw8bit",
    "optim_memory": "0",
    "optim_directory": "/var/tmp",
    "optim_paged_from": 0,
}


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def run(output: Path, **changes: Any) -> tuple[nn.Module, TrainResult, list[str]]:
    model = model_with_dropout()
    settings: dict[str, Any] = {
        "output": output, "steps": 5, "batch_size": 2, "gradient_accumulation": 3, "plot": False,
        "max_length": 96, "learning_rate": 5e-3, "checkpoint_every": 3, "overwrite": True,
    }  # fmt: skip
    listener = Listener()
    config = TrainConfig(**(settings | changes))
    return model, train(model, config, examples(40), reporter=listener), listener.said


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_same_bits_and_figures(tmp_path: Path) -> None:
    plain, result, _ = run(tmp_path / "a", optimizer="adamw8bit")
    assert result.paging is None
    paged, result, _ = run(tmp_path / "b", **PAGED)
    assert_same_bits(plain, paged)
    assert result.paging is not None and result.paging["pager"] == "file"
    records = read_metrics(tmp_path / "b" / "metrics.jsonl")
    for record in records:
        assert record["optim_resident"] + record["optim_paged_out"] == record["optim_bytes"] > 0
        assert record["optim_moved"] > 0 and record["optim_waited"] > 0
        assert f"/{record['optim_bytes'] / 2**20:.0f} MiB in memory" in describe(record)
    assert "MiB paged (file), " in describe_paging(result.paging)
    assert not any("optim_bytes" in r for r in read_metrics(tmp_path / "a" / "metrics.jsonl"))


def test_goes_on_with_other_settings_of_paging(tmp_path: Path) -> None:
    whole, _, _ = run(tmp_path / "a", **PAGED)
    changes = PAGED | {"optim_memory": "auto", "overwrite": False, "resume": True}
    (tmp_path / "a" / "checkpoints" / "step-000005").rename(tmp_path / "away")
    again, result, said = run(tmp_path / "a", **changes)
    assert any("Going on from" in line for line in said) and result.steps == 5
    assert_same_bits(whole, again)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_one_more_try_has_the_bits_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Dropout and the gradients of the passes before are put back."""
    whole, _, _ = run(tmp_path / "a", **PAGED)
    passes = 0
    real = OutputHead.token_losses

    def failing(self: OutputHead, batch: Batch) -> Any:
        nonlocal passes
        passes += 1
        result = real(self, batch)
        if passes == 8:  # the second of the third step
            raise error("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")
        return result

    monkeypatch.setattr(OutputHead, "token_losses", failing)
    survived, result, said = run(tmp_path / "b", **(PAGED | {"optim_memory": "auto"}))
    assert passes == 5 * 3 + 2
    assert [line for line in said if line.startswith("Out of memory")] == [
        "Out of memory (CUDA out of memory. Tried to allocate 2 GiB): 0 MiB of the optimizer's "
        "state were paged out; trying once more"
    ]
    assert result.steps == 5
    assert_same_bits(whole, survived)


@pytest.mark.parametrize("changes", [PAGED, {"optimizer": "adamw8bit"}], ids=["twice", "plain"])
def test_what_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def failing(self: OutputHead, batch: Batch) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(OutputHead, "token_losses", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, **changes)


def test_other_errors_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    def failing(self: OutputHead, batch: Batch) -> Any:
        nonlocal passes
        passes += 1
        raise RuntimeError("another")

    monkeypatch.setattr(OutputHead, "token_losses", failing)
    with pytest.raises(RuntimeError, match="another"):
        run(tmp_path, **PAGED)
    assert passes == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim_memory": "2 gigs"}, "optim_memory must be 'auto', a number of bytes, or text"),
        ({"optim_paged_from": -1}, "optim_paged_from must be at least 0, got -1"),
        ({"optimizer": "paged"}, "optimizer must be one of 'adamw', 'adamw8bit', 'paged_adamw'"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
