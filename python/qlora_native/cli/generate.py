"""`qlora-native generate`: answers a prompt, or holds a conversation."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
from qlora_native.generation import Message, Sampling, encode_chat, encode_raw
from qlora_native.generation import generate as generate_text


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to answer. Without it: standard input, or a conversation on a terminal.",
            show_default=False,
        ),
    ] = None,
    adapter: AdapterOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="System message; by default the chat template's own.", show_default=False
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token (greedy); higher is more varied.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    config: ConfigFile = None,
) -> None:
    """Answer a prompt with a model, alone or with a trained adapter; the text streams.

    Examples:

    qlora-native generate demo "What is a qubit?"

    qlora-native generate demo --adapter runs/demo/adapter --temperature 0.7 --top-p 0.9
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if raw and system is not None:
        fail("--system has no meaning with --raw, which uses no chat template")
    converse = prompt is None and sys.stdin.isatty()
    if prompt is None and not converse:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        fail("the prompt is empty")
    loaded, tokenizer = load_for_use(model, adapter, dtype, threads)
    start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    if prompt is None:
        _converse(loaded, tokenizer, start, sampling, raw)
    elif raw:
        _stream(loaded, tokenizer, encode_raw(tokenizer, prompt), sampling)
    else:
        messages = [*start, {"role": "user", "content": prompt}]
        _stream(loaded, tokenizer, encode_chat(tokenizer, messages), sampling)


def _converse(
    model: Any, tokenizer: Any, messages: list[Message], sampling: Sampling, raw: bool
) -> None:
    """Turn by turn until the end of input or Ctrl-C at the prompt; Ctrl-C ends an answer only."""
    typer.echo("Ctrl-C ends an answer, Ctrl-D the conversation.", err=True)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return
        if not line.strip():
            continue
        turns = [*messages, {"role": "user", "content": line}]
        try:
            ids = encode_raw(tokenizer, line) if raw else encode_chat(tokenizer, turns)
            answer = _stream(model, tokenizer, ids, sampling)
        except KeyboardInterrupt:
            typer.echo(" (stopped)", err=True)
            continue
        messages = [*turns, {"role": "assistant", "content": answer}]


def _stream(model: Any, tokenizer: Any, input_ids: Any, sampling: Sampling) -> str:
    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    answer = generate_text(model, tokenizer, input_ids, sampling, show)
    show("\n")
    return answer
