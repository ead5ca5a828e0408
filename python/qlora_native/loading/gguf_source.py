"""GGUF files: llama.cpp's single-file models, read through transformers and the `gguf` package.

transformers maps names, undoes llama.cpp's permutations and rebuilds the tokenizer with its chat
template; it holds the whole model in `dtype` meanwhile (unlike the folder loader), and takes some
twenty seconds for SmolLM2. The quantized result is therefore cached.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.hf import hf
from qlora_native.loading.skeleton import Config, Model

_MAGIC = b"GGUF"
# What the gguf package and transformers raise for files that are cut off, mangled or unknown.
_CANNOT_READ = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OSError,
    NotImplementedError,
    OverflowError,
    struct.error,
)


def load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Model, Any]:
    """A GGUF file's model, dequantized to `dtype` (default float32), and its tokenizer."""
    _check(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with _quietly():
            model = hf().AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype or torch.float32, **_as_floats()
            )
            tokenizer = hf().AutoTokenizer.from_pretrained(**where)
    except _CANNOT_READ as error:
        raise _refusal(path, error) from error
    # transformers writes the model's display name here, which is no place to load from.
    model.name_or_path = model.config._name_or_path = str(path)
    return model.eval(), tokenizer


def _as_floats() -> dict[str, Any]:
    """Keeps newer transformers from leaving weights packed in layers of its own."""
    has_packed_layers = hasattr(hf(), "GgufConfig")
    return {"quantization_config": hf().GgufConfig(dequantize=True)} if has_packed_layers else {}


def read_gguf_config(path: Path) -> Config:
    """The transformers config that a GGUF file's metadata describes."""
    _check(path)
    try:
        with _quietly():
            return hf().AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except _CANNOT_READ as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a GGUF model: {' '.join(str(error).split())[:300]}; "
        "it is damaged, or of a kind that transformers does not know"
    )


def _check(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path} is no GGUF file: it begins with {magic!r} instead of {_MAGIC!r}"
        )
    # transformers' own message about a missing one is longer than a screen, or no ImportError.
    import accelerate  # noqa: F401
    import gguf  # noqa: F401


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars and notes that transformers writes to stderr meanwhile."""
    reading = hf("modeling_gguf_pytorch_utils")
    transformers_logging = hf("utils.logging")
    bars_were_on = transformers_logging.is_progress_bar_enabled()
    bar = reading.tqdm
    transformers_logging.disable_progress_bar()
    reading.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reading.tqdm = bar
        if bars_were_on:
            transformers_logging.enable_progress_bar()
