"""`qlora-native train`: from a model and records to a trained adapter.

The options are the fields of TrainConfig with their help: a setting is defined there and nowhere
else.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from qlora_native.cli.config import ConfigFile
from qlora_native.config import ConfigError, TrainConfig

# 128 + the signal's number, as shells have it.
_EXIT_STOPPED = {"SIGINT": 130, "SIGTERM": 143}


def train(config: Path | None = None, **settings: Any) -> None:
    """Fine-tune a model: 4-bit base weights, LoRA adapters, your records.

    Writes OUTPUT/adapter (PEFT's format), checkpoints, metrics.jsonl, run.json and loss.png. Ctrl-C
    finishes the step and writes a checkpoint; --resume goes on from it as if nothing had been.

    Example: qlora-native train --model demo --data chats.jsonl --output runs/chats --epochs 2
    """
    run(TrainConfig(**settings))


def run(config: TrainConfig) -> None:
    """Loads, prepares, trains, and shows what came of it."""
    import torch
    from rich.console import Console

    from qlora_native.adapter import save_adapter
    from qlora_native.loading import activation_dtype, load_model
    from qlora_native.model import add_lora, footprint
    from qlora_native.progress import make_reporter
    from qlora_native.records import read_records
    from qlora_native.train import train as train_model

    for name in ("model", "data"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; give it on the command line or in --config")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Records first: a mistake in them shows before the model has been loaded.
    records, eval_records = read_records(config.data), read_records(config.eval_data)
    with Console(stderr=True).status(f"loading {config.model}"):
        model, tokenizer = load_model(
            config.model,
            dtype=activation_dtype(config.dtype),
            format=config.format,
            blocksize=config.blocksize,
            double_quant=config.double_quant,
        )
    _check_length(config, model)
    torch.manual_seed(config.seed)
    add_lora(
        model,
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=parse_targets(config.targets),
        use_rslora=config.use_rslora,
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(footprint(model)))
    training, held_out = _examples(config, records, eval_records, tokenizer, console)
    result = train_model(
        model,
        config,
        training,
        held_out,
        pad_id=tokenizer.pad_token_id or 0,
        save_adapter=lambda folder: save_adapter(model, folder, base_model_name=config.model),
        reporter=make_reporter(sys.stdout),
    )
    _summarize(config, result, console)
    if result.stopped_by is not None:
        console.print(f"Stopped by {result.stopped_by}; the same command with --resume goes on")
        raise typer.Exit(_EXIT_STOPPED[result.stopped_by])


def parse_targets(targets: str) -> str | list[str]:
    """`all-linear`, or names with commas between, or a regular expression."""
    names = [name.strip() for name in targets.split(",")]
    if targets != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    return targets


def _check_length(config: TrainConfig, model: Any) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise ConfigError(
            f"max_length must be at most {longest}, the model's longest context, "
            f"got {config.max_length}"
        )


def _examples(
    config: TrainConfig,
    records: Sequence[Any],
    eval_records: Sequence[Any],
    tokenizer: Any,
    console: Any,
) -> tuple[list[Any], list[Any]]:
    """Examples to train on, and held-out ones."""
    from qlora_native.data import split_held_out, tokenize

    def tokenized(some: Sequence[Any]) -> list[Any]:
        examples, report = tokenize(
            some, tokenizer, max_length=config.max_length, train_on=config.train_on
        )
        for line in report.lines():
            console.print(line)
        return examples

    training = tokenized(records)
    if eval_records:
        held_out = tokenized(eval_records)
    else:
        training, held_out = split_held_out(training, config.held_out, config.seed)
    console.print(f"{len(training)} examples to train on, {len(held_out)} held out")
    return training, held_out


def _summarize(config: TrainConfig, result: Any, console: Any) -> None:
    """Draws the plot and prints the table that a run ends with."""
    from rich.table import Table

    from qlora_native.metrics import read_metrics
    from qlora_native.plot import plot_loss
    from qlora_native.progress import describe_paging

    rows = [
        ("steps", str(result.steps)),
        ("time", f"{result.seconds:.0f} s, {result.tokens / result.seconds:,.0f} tokens/s"),
        ("peak memory", f"{result.peak_memory / 2**30:.2f} GiB"),
    ]
    if result.paging is not None:
        rows.append(("optimizer's state", describe_paging(result.paging)))
    for when, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            value = f"{evaluation.perplexity:.3f} ± {evaluation.perplexity_stderr:.3f}"
            rows.append((f"held-out perplexity {when}", value))
    if config.plot:
        path = Path(config.output) / "loss.png"
        plot_loss(read_metrics(path.with_name("metrics.jsonl")), path, config.model)
        rows.append(("plot", str(path)))
    if result.checkpoint is not None:
        rows.append(("checkpoint", str(result.checkpoint)))
    if result.adapter is not None:
        rows.append(("adapter", str(result.adapter)))
        rows.append(("try it", f"qlora-native generate {config.model} --adapter {result.adapter}"))
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _options() -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of each option, from TrainConfig."""
    hints = get_type_hints(TrainConfig)
    options: dict[str, tuple[Any, Any]] = {}
    for setting in dataclasses.fields(TrainConfig):
        kind: Any = hints[setting.name]
        default: Any = setting.default
        if get_origin(kind) is tuple:
            kind, default = list[str], list(default)
        also = setting.metadata["also"]
        names = [f"--{setting.name.replace('_', '-')}", also] if also else []
        option = typer.Option(
            *names,
            help=setting.metadata["help"],
            rich_help_panel=setting.metadata["panel"],
            show_default=default not in (None, "", []),
        )
        options[setting.name] = (Annotated[kind, option], default)
    return options


def _give_signature() -> None:
    """Typer reads a command's options off its signature: this makes the one that is meant."""
    options = _options() | {"config": (ConfigFile, None)}
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (annotation, default) in options.items()
    ]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}


_give_signature()
