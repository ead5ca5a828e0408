"""`qlora-native eval`: perplexity of a text, with its standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_native.cli.config import ConfigFile
from qlora_native.cli.errors import fail
from qlora_native.cli.options import (
    AdapterOption,
    ModelArgument,
    PrecisionOption,
    ThreadsOption,
    load_for_use,
)


def eval_command(
    model: ModelArgument,
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Texts or records: .txt, .jsonl or .json, as `train` takes them.",
            show_default=False,
        ),
    ],
    adapter: AdapterOption = None,
    train_on: Annotated[
        Literal["answers", "all"],
        typer.Option(help="Of conversations: count the answers' tokens only, or all."),
    ] = "answers",
    max_length: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")
    ] = False,
    dtype: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    config: ConfigFile = None,
) -> None:
    """Measure how well a model predicts a text: perplexity and its standard error.

    Perplexity is exp(mean loss per token): 1 is certainty, lower is better. The standard error
    takes each record (or piece of a text) as one observation.

    Example: qlora-native eval demo held_out.jsonl --adapter runs/demo/adapter
    """
    from qlora_native.collate import BatchPlan
    from qlora_native.data import tokenize
    from qlora_native.evaluate import evaluate
    from qlora_native.records import read_records

    records = read_records(data)
    loaded, tokenizer = load_for_use(model, adapter, dtype, threads)
    examples, report = tokenize(records, tokenizer, max_length=max_length, train_on=train_on)
    for line in report.lines():
        typer.echo(f"note: {line}", err=True)
    if not examples:
        fail(f"{', '.join(map(str, data))}: nothing to measure, no token is left to predict")
    plan = BatchPlan(
        examples=examples,
        batch_size=batch_size,
        max_length=max_length,
        packing=False,
        group_by_length=False,
        pad_id=tokenizer.pad_token_id or 0,
        seed=0,
    )
    result = evaluate(loaded, plan.in_order())
    if as_json:
        values = {
            "perplexity": result.perplexity,
            "perplexity_stderr": result.perplexity_stderr,
            "loss": result.loss,
            "loss_stderr": result.loss_stderr,
            "tokens": result.tokens,
            "examples": result.examples,
        }
        typer.echo(json.dumps(values))
    else:
        typer.echo(
            f"perplexity {result.perplexity:.3f} ± {result.perplexity_stderr:.3f} "
            f"({result.tokens} tokens in {result.examples} examples)"
        )
