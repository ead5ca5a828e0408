"""The training loop.

    step = gradient_accumulation forward and backward passes, then one optimizer step
    loss = sum of the losses of all labelled tokens of the step / their number

The division is by the whole step's tokens, so accumulating over several batches equals one large
batch, however the labels are spread over them.

Whatever decides what is computed is either a function of the settings and the step's number (data
order, learning rate) or in the checkpoint (trained parameters, optimizer, random state).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_native import files
from qlora_native.checkpoint import CheckpointStore
from qlora_native.collate import Batch, BatchPlan, check_isolation
from qlora_native.config import ConfigError, TrainConfig
from qlora_native.data import Example, fingerprint
from qlora_native.evaluate import Evaluation, evaluate
from qlora_native.loss import OutputHead
from qlora_native.metrics import MetricsLog, describe_environment, peak_rss, write_run
from qlora_native.paging import with_room
from qlora_native.progress import Reporter
from qlora_native.resume import (
    capture,
    check_same_run,
    identity,
    random_state,
    restore,
    set_random_state,
)
from qlora_native.schedule import Schedule, warmup_steps
from qlora_native.signals import StopRequest


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is no longer a number; the message says where and what is left."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int  # taken in all, before and after a resume
    tokens: int  # gone through in this call, without padding
    seconds: float
    peak_memory: int  # bytes, the whole process
    loss: float | None  # of the last step taken in this call
    before: Evaluation | None  # on the held-out examples; None when resumed, or without any
    after: Evaluation | None  # None when stopped, or without held-out examples
    stopped_by: str | None  # "SIGINT" or "SIGTERM"
    checkpoint: Path | None
    adapter: Path | None  # None when stopped, or without save_adapter
    paging: dict[str, Any] | None = None  # the optimizer's paging(), if its state is paged


def train(
    model: nn.Module,
    config: TrainConfig,
    training: Sequence[Example],
    held_out: Sequence[Example] = (),
    *,
    pad_id: int = 0,
    save_adapter: Callable[[Path], object] | None = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Trains the parameters of `model` that require a gradient; writes to `config.output`.

    Args:
        model: a causal language model as transformers has them.
        config: the settings; those of the model, the data and the adapter are not used here.
        training: examples to learn from, none longer than `config.max_length`.
        held_out: examples to evaluate on: before, every `eval_every` steps, and after.
        pad_id: the token that fills up rows; any will do, it is neither seen nor learned.
        save_adapter: writes the adapter into a folder; it goes into each checkpoint and, at the
            end, to `output/adapter`.
        reporter: shows the progress.

    Raises:
        ConfigError: nothing to train, or `resume` with other settings or other data.
        NonFiniteLossError: the loss or the gradient became infinite or NaN.
        CheckpointError: a checkpoint cannot be written, or none can be read.
    """
    return Trainer(model, config, training, held_out, pad_id, save_adapter, reporter).run()


class Trainer:
    """One run; see `train`."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        training: Sequence[Example],
        held_out: Sequence[Example],
        pad_id: int,
        save_adapter: Callable[[Path], object] | None,
        reporter: Reporter | None,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError(
                "model has no parameter that requires a gradient; call add_lora(model)"
            )
        if not training:
            raise ConfigError("training is empty: there is nothing to learn from")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)

        self.model, self.config = model, config
        self.save_adapter, self.reporter = save_adapter, reporter or Reporter()
        self.output = Path(config.output)
        self.plan = _plan(training, config, pad_id)
        self.evaluation = _plan(held_out, config, pad_id).in_order() if held_out else []
        self.batches_per_epoch = self.plan.batches_per_epoch()
        batches = config.epochs * self.batches_per_epoch
        self.steps = config.steps or math.ceil(batches / config.gradient_accumulation)
        warmup = warmup_steps(config.warmup, self.steps)
        self.schedule = Schedule(config.schedule, config.learning_rate, self.steps, warmup)
        self.optimizer = make_optimizer(list(self.parameters.values()), config)
        self.identity = identity(config, self.steps, fingerprint(training))
        self.store = CheckpointStore(self.output / "checkpoints", config.keep_checkpoints)
        self.checkpoint: Path | None = None
        self.checkpoint_step: int | None = None
        self.done = 0  # steps

        self.head = OutputHead.of(model)
        if config.packing:
            check_isolation(model)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    def run(self) -> TrainResult:
        if self.config.resume:
            self._resume()
        else:
            self._start_anew()
        start, began = self.done, time.monotonic()
        self.output.mkdir(parents=True, exist_ok=True)
        described = self.identity | {"machine": describe_environment()}
        write_run(self.output / "run.json", described)
        stop = StopRequest(
            lambda name: self.reporter.say(
                f"{name}: finishing this step, then writing a checkpoint; once more stops at once"
            )
        )
        tokens, loss, before, after = 0, None, None, None
        with MetricsLog(self.output / "metrics.jsonl", start) as self.log, stop:
            try:
                self.reporter.start(self.steps, start)
                if start == 0:
                    before = self._evaluate()
                stream = self.plan.stream(start * self.config.gradient_accumulation)
                while self.done < self.steps and not stop:
                    batches = list(islice(stream, self.config.gradient_accumulation))
                    loss = self._step(batches)
                    tokens += sum(batch.tokens for batch in batches)
                    if self._due(self.config.eval_every) and self.done < self.steps and not stop:
                        self._evaluate()
                    if self._due(self.config.checkpoint_every):
                        self._write_checkpoint()
                if not stop:
                    after = self._evaluate()
                elif self.checkpoint_step != self.done:
                    self._write_checkpoint()
            finally:
                self.reporter.close()
        result = TrainResult(
            steps=self.done,
            tokens=tokens,
            seconds=time.monotonic() - began,
            peak_memory=peak_rss(),
            loss=loss,
            before=before,
            after=after,
            stopped_by=stop.name,
            checkpoint=self.checkpoint,
            adapter=None if stop else self._write_adapter(),
            paging=self._paging(),
        )
        write_run(self.output / "run.json", described | {"result": asdict(result)})
        return result

    def _step(self, batches: list[Batch]) -> float:
        """One optimizer step; returns the mean loss of the labelled tokens."""
        began = time.monotonic()
        self.model.train()
        rate = self.schedule(self.done)
        labelled = sum(batch.labelled for batch in batches)
        random = random_state()

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(random)

        loss = with_room(
            lambda: self._passes(batches, labelled),
            self.optimizer,
            undo=undo,
            say=self.reporter.say,
        )
        norm = clip_gradients(self.parameters.values(), self.config.max_grad_norm)
        if not math.isfinite(norm):
            raise self._non_finite("gradient's norm", norm, batches)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

        tokens = sum(batch.tokens for batch in batches)
        record = {
            "step": self.done,
            "epoch": self.done * self.config.gradient_accumulation / self.batches_per_epoch,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "labelled": labelled,
            "tokens_per_second": tokens / (time.monotonic() - began),
        }
        if (paging := self._paging()) is not None:
            moved = paging["moved_in"] + paging["moved_out"]
            record |= {
                "optim_bytes": paging["bytes"],
                "optim_resident": paging["resident"],
                "optim_paged_out": paging["paged_out"],
                "optim_moved": moved,
                "optim_waited": paging["waited"],
            }
        if self._due(self.config.log_every) or self.done == self.steps:
            self.log.write(record)
        self.reporter.step(record)
        return loss

    def _passes(self, batches: list[Batch], labelled: int) -> float:
        """Forward and backward of all; returns their part of the mean loss."""
        loss = 0.0
        for batch in batches:
            losses, _ = self.head.token_losses(batch)
            part = losses.sum() / labelled
            loss += (value := part.item())
            if not math.isfinite(value):
                raise self._non_finite("loss", value, [batch])
            torch.autograd.backward(part)
        return loss

    def _paging(self) -> dict[str, Any] | None:
        paging = getattr(self.optimizer, "paging", None)
        return None if paging is None else paging()

    def _due(self, every: int | None) -> bool:
        return bool(every and (self.done % every == 0 or self.done == self.steps))

    def _evaluate(self) -> Evaluation | None:
        if not self.evaluation:
            return None
        result = evaluate(
            self.model, self.evaluation, head=self.head, advance=self.reporter.evaluating
        )
        record = {
            "step": self.done,
            "eval_loss": result.loss,
            "eval_loss_stderr": result.loss_stderr,
            "eval_perplexity": result.perplexity,
            "eval_perplexity_stderr": result.perplexity_stderr,
        }
        self.log.write(record)
        self.reporter.evaluated(record)
        return result

    def _write_checkpoint(self) -> None:
        state = capture(self.done, self.parameters, self.optimizer, self.identity)
        self.checkpoint = self.store.write(self.done, state, self.save_adapter)
        self.checkpoint_step = self.done
        self.reporter.say(f"Wrote {self.checkpoint}")

    def _write_adapter(self) -> Path | None:
        if self.save_adapter is None:
            return None
        files.write_folder(self.output / "adapter", self.save_adapter)
        return self.output / "adapter"

    def _start_anew(self) -> None:
        if not (self.output / "run.json").exists():
            return
        if not self.config.overwrite:
            raise ConfigError(
                f"output: {self.output} holds an earlier run; give another folder, resume to go on "
                "with it, or overwrite to remove it"
            )
        files.remove(self.store.folder)

    def _resume(self) -> None:
        found = self.store.read_latest()
        if found is None:
            self.reporter.say(f"No checkpoint in {self.store.folder}: starting at step 0")
            return
        for reason in found.passed_over:
            self.reporter.say(f"Passing over a corrupt checkpoint: {reason}")
        check_same_run(found.state["identity"], self.config, self.identity)
        self.done = restore(found.state, self.parameters, self.optimizer)
        self.checkpoint, self.checkpoint_step = found.path, self.done
        self.reporter.say(f"Going on from {found.path}")

    def _non_finite(self, what: str, value: float, batches: list[Batch]) -> NonFiniteLossError:
        origins = [origin for batch in batches for origin in batch.origins]
        more = f" and {len(origins) - 12} more" if len(origins) > 12 else ""
        last = (
            f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint yet"
        )
        return NonFiniteLossError(
            f"the {what} is {value} at step {self.done + 1}, records {', '.join(origins[:12])}"
            f"{more}; {last}. Try a lower learning_rate, a longer warmup, or look at these records"
        )


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "torch":
        return torch.optim.AdamW(parameters, **settings)
    from qlora_native import optim

    if config.optimizer.startswith("paged_"):
        settings |= {
            "device_budget": config.optim_memory,
            "paging_directory": config.optim_directory or None,
            "min_paged_size": config.optim_paged_from,
        }
    make: dict[str, type[torch.optim.Optimizer]] = {
        "adamw": optim.AdamW,
        "adamw8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw8bit": optim.PagedAdamW8bit,
    }
    return make[config.optimizer](parameters, **settings)


def clip_gradients(parameters: Any, max_norm: float) -> float:
    """Scales all gradients so that their common norm is at most `max_norm` (0: as they are)."""
    limit = max_norm if max_norm > 0 else math.inf
    return float(nn.utils.clip_grad_norm_(list(parameters), limit))


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Lets transformers recompute each layer in the backward pass.

    The non-reentrant kind is asked for: the reentrant one gives a layer no gradient unless its
    input requires one, and under frozen embeddings the first layer's does not, so its adapters
    would not learn ("element 0 of tensors does not require grad").
    """
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the older name last
        if hasattr(model, f"{name}_enable"):
            enable = getattr(model, f"{name}_enable")
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            return
    raise ConfigError(
        f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable"
    )


def _plan(examples: Sequence[Example], config: TrainConfig, pad_id: int) -> BatchPlan:
    return BatchPlan(
        examples=examples,
        batch_size=config.batch_size,
        max_length=config.max_length,
        packing=config.packing,
        group_by_length=config.group_by_length,
        pad_id=pad_id,
        seed=config.seed,
    )
