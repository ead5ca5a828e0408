"""Quantize, ask, measure, train, ask again, measure again: the whole of QLoRA in one command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_native.cli.errors import one_line_errors
from qlora_native.config import TrainConfig
from qlora_native.demo.corpus import load_split, write_records

# Held out by `load_split`, so that no answer to them is learned by heart.
QUESTIONS = ("Are you sentient?", "Tell me a joke", "My screen is flickering.")

SETTINGS = TrainConfig(
    model="demo",
    output="runs/demo",
    r=16,
    alpha=32,
    max_length=256,
    batch_size=2,
    epochs=1,
    learning_rate=5e-4,
    checkpoint_every=0,
    seed=0,
)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the few options there are, and run."""
    parser = argparse.ArgumentParser(prog="python -m qlora_native.demo", description=__doc__)
    parser.add_argument("--output", default=SETTINGS.output, help="folder for everything written")
    parser.add_argument("--steps", type=int, help="steps to train, in place of one epoch")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch decides")
    parser.add_argument(
        "--paged",
        action="store_true",
        help="keep the optimizer's state in a file: it is in memory for its moment of each step",
    )
    chosen = parser.parse_args(arguments)
    config = dataclasses.replace(
        SETTINGS,
        output=chosen.output,
        steps=chosen.steps,
        threads=chosen.threads,
        optimizer="paged_adamw8bit" if chosen.paged else SETTINGS.optimizer,
        optim_memory="0" if chosen.paged else SETTINGS.optim_memory,
        optim_paged_from=0 if chosen.paged else SETTINGS.optim_paged_from,
        overwrite=chosen.output == SETTINGS.output,  # an earlier demo, but no other run
    )
    run(config)


def run(config: TrainConfig) -> None:
    """The demo, in `config.output`."""
    import torch
    from rich.console import Console

    from qlora_native import __version__, cpu_isa
    from qlora_native.adapter import save_adapter
    from qlora_native.loading import activation_dtype, load_model
    from qlora_native.model import add_lora, footprint
    from qlora_native.progress import make_reporter
    from qlora_native.train import train

    began = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dtype = activation_dtype(config.dtype)
    console.rule(f"qlora_native {__version__}")
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, instructions {cpu_isa()}, "
        f"activations in {str(dtype).removeprefix('torch.')}"
    )
    with console.status("Loading SmolLM2-135M-Instruct and quantizing it to NF4"):
        model, tokenizer = load_model("demo", dtype=dtype)
    console.print(
        f"Loaded SmolLM2-135M-Instruct in {time.monotonic() - began:.1f} s: {footprint(model)}"
    )

    training, held_out = _examples(config, tokenizer, console)
    before = _answers(model, tokenizer, console, "Before training")
    torch.manual_seed(config.seed)
    add_lora(model, r=config.r, alpha=config.alpha)
    console.rule("Training")
    result = train(
        model,
        config,
        training,
        held_out,
        pad_id=tokenizer.pad_token_id,
        save_adapter=lambda folder: save_adapter(model, folder, base_model_name=config.model),
        reporter=make_reporter(sys.stdout),
    )
    if result.stopped_by is not None:
        console.print(f"Stopped by {result.stopped_by}.")
        raise SystemExit(130)
    after = _answers(model, tokenizer, console, "After training")
    _write_answers(Path(config.output) / "answers.md", before, after)
    _summarize(config, result, time.monotonic() - began, console)


def _examples(config: TrainConfig, tokenizer: Any, console: Any) -> tuple[list[Any], list[Any]]:
    """Write both parts of the corpus as records, and tokenize them."""
    from qlora_native.data import tokenize
    from qlora_native.records import read_records

    parts = load_split(QUESTIONS)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for name, dialogues in (("train", parts.train), ("held_out", parts.held_out)):
        path = folder / f"{name}.jsonl"
        write_records(path, dialogues)
        found, _ = tokenize(
            read_records([path]), tokenizer, max_length=config.max_length, train_on=config.train_on
        )
        examples.append(found)
    training, held_out = examples
    console.print(
        f"chatterbot-corpus, English: {len(parts.train)} dialogues to train on, "
        f"{len(parts.held_out)} held out, no question in both"
    )
    return training, held_out


def _answers(model: Any, tokenizer: Any, console: Any, title: str) -> list[str]:
    """Ask the three questions; greedy, so that the answers are the same on every run."""
    from qlora_native.generation import Sampling, encode_chat, generate

    console.rule(title)
    answers = []
    for question in QUESTIONS:
        console.print(f"[bold]{question}[/bold]")
        ids = encode_chat(tokenizer, [{"role": "user", "content": question}])
        answer = generate(
            model,
            tokenizer,
            ids,
            Sampling(max_new_tokens=60),
            lambda text: console.print(text, end="", markup=False),
        )
        console.print()
        answers.append(answer.strip())
    return answers


def _write_answers(path: Path, before: list[str], after: list[str]) -> None:
    from qlora_native.files import write_file

    rows = ["| question (held out) | before | after |", "|---|---|---|"]
    for cells in zip(QUESTIONS, before, after, strict=True):
        rows.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    write_file(path, "\n".join(rows) + "\n")


def _summarize(config: TrainConfig, result: Any, seconds: float, console: Any) -> None:
    """The plot, and the table that a newcomer should remember."""
    from rich.table import Table

    from qlora_native.metrics import read_metrics
    from qlora_native.plot import plot_loss
    from qlora_native.progress import describe_paging

    folder = Path(config.output)
    plot = folder / "loss.png"
    plot_loss(read_metrics(folder / "metrics.jsonl"), plot, "SmolLM2-135M-Instruct, NF4 + LoRA")
    fall = 1 - result.after.perplexity / result.before.perplexity
    rows = [
        ("held-out perplexity before", _perplexity(result.before)),
        ("held-out perplexity after", f"{_perplexity(result.after)}  ({fall:.0%} lower)"),
        ("training", f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s"),
        ("speed", f"{result.tokens / result.seconds:,.0f} tokens/s, evaluations included"),
        ("peak memory", f"{result.peak_memory / 2**30:.2f} GiB"),
        *([("optimizer's state", describe_paging(result.paging))] if result.paging else []),
        ("whole demo", f"{seconds:.0f} s"),
        ("loss plot", str(plot)),
        ("answers side by side", str(folder / "answers.md")),
        ("adapter (PEFT's format)", str(result.adapter)),
        ("talk to it", f"qlora-native generate demo --adapter {result.adapter}"),
    ]
    console.rule("Summary")
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _perplexity(evaluation: Any) -> str:
    return f"{evaluation.perplexity:.2f} ± {evaluation.perplexity_stderr:.2f}"


if __name__ == "__main__":
    main()
