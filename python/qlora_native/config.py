"""TrainConfig: every setting of a training run, with its default, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qlora_native.paging.budget import is_budget

# Settings that may differ between a run and its continuation: they change nothing that is computed.
HARMLESS = frozenset(
    {
        # Where things are; the data itself is compared by its hash.
        *("data", "eval_data", "output"),
        *("resume", "overwrite", "eval_every", "checkpoint_every", "keep_checkpoints"),
        *("log_every", "plot", "threads"),
        *("optim_memory", "optim_directory", "optim_paged_from"),
    }
)


class ConfigError(ValueError):
    """A setting that cannot be; the message names it, what came and what is wanted."""


def _setting(default: Any, panel: str, help: str, also: str | None = None) -> Any:
    """`also`: another name of its option."""
    return field(default=default, metadata={"panel": panel, "help": help, "also": also})


_WHAT = "Model, data and output"
_BASE = "4-bit base and adapter"
_BATCH = "Batches"
_OPTIM = "Optimization"
_WATCH = "Evaluation, checkpoints, metrics"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. The metadata of each field is its help text on the command line."""

    model: str = _setting("", _WHAT, "Hugging Face folder, quantized folder, GGUF file, or 'demo'.")
    data: tuple[str, ...] = _setting(
        (), _WHAT, "Training files: .jsonl, .json or .txt; may be repeated."
    )
    output: str = _setting("out", _WHAT, "Folder for adapter, checkpoints, metrics and plot.")
    eval_data: tuple[str, ...] = _setting(
        (), _WHAT, "Evaluation files, in place of a held-out part."
    )
    held_out: float = _setting(
        0.05,
        _WHAT,
        "Part of the data kept for evaluation: a fraction below 1, or a number of examples.",
    )
    train_on: Literal["answers", "all"] = _setting(
        "answers", _WHAT, "Learn the assistant's answers only, or every token."
    )
    format: Literal["nf4", "fp4"] = _setting("nf4", _BASE, "4-bit format of the base weights.")
    blocksize: int = _setting(64, _BASE, "Values per scale of the base weights.")
    double_quant: bool = _setting(True, _BASE, "Quantize the scales, too.")
    dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto",
        _BASE,
        "Activations: auto takes bfloat16 where the processor computes in it, else float32.",
    )
    r: int = _setting(16, _BASE, "Rank of the adapters.")
    alpha: float = _setting(32.0, _BASE, "The adapters' output is scaled by alpha / r.")
    dropout: float = _setting(0.0, _BASE, "Dropout on the adapters' input.")
    targets: str = _setting(
        "all-linear", _BASE, "Linears that get an adapter: all-linear, or names: q_proj,v_proj."
    )
    use_rslora: bool = _setting(False, _BASE, "Scale by alpha / sqrt(r) instead.")
    max_length: int = _setting(
        512, _BATCH, "Longest sequence in tokens; a packed row has this length."
    )
    batch_size: int = _setting(4, _BATCH, "Rows in one forward pass.")
    gradient_accumulation: int = _setting(1, _BATCH, "Forward passes in one step.")
    packing: bool = _setting(
        True, _BATCH, "Put several examples in one row (they do not see each other)."
    )
    group_by_length: bool = _setting(
        False, _BATCH, "Without packing: batch examples of like length."
    )
    epochs: float = _setting(1.0, _OPTIM, "Passes over the data; may be a fraction.")
    steps: int | None = _setting(None, _OPTIM, "Number of steps, in place of epochs.")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "torch"] = _setting(
        "adamw",
        _OPTIM,
        "AdamW with 32-bit or 8-bit state, its state paged or not, or torch's own.",
        also="--optim",
    )
    optim_memory: str = _setting(
        "auto", _OPTIM, "Paged: memory the state may stay in: 2GB, 512MiB, bytes, or what is free."
    )
    optim_directory: str = _setting(
        "", _OPTIM, "Paged, on a CPU: a folder on a disk for the state; TMPDIR or /var/tmp if none."
    )
    optim_paged_from: int = _setting(
        100_000, _OPTIM, "Paged: state of tensors with fewer values stays as it is."
    )
    learning_rate: float = _setting(2e-4, _OPTIM, "Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = _setting("cosine", _OPTIM, "After warm-up.")
    warmup: float = _setting(
        0.03, _OPTIM, "Warm-up: a fraction of the steps below 1, or a number of steps."
    )
    weight_decay: float = _setting(0.0, _OPTIM, "Decoupled weight decay.")
    adam_beta1: float = _setting(0.9, _OPTIM, "Decay of AdamW's first moment.")
    adam_beta2: float = _setting(0.999, _OPTIM, "Decay of AdamW's second moment.")
    adam_eps: float = _setting(1e-8, _OPTIM, "AdamW's epsilon.")
    max_grad_norm: float = _setting(
        1.0, _OPTIM, "Clip the gradient's norm to this; 0 does not clip."
    )
    gradient_checkpointing: bool = _setting(
        False, _OPTIM, "Recompute activations: less memory, slower."
    )
    seed: int = _setting(0, _OPTIM, "Seed of the split, the order, the adapters and dropout.")
    threads: int | None = _setting(None, _OPTIM, "CPU threads; by default torch decides.")
    eval_every: int | None = _setting(
        None, _WATCH, "Evaluate every so many steps; always before and after."
    )
    checkpoint_every: int = _setting(
        100, _WATCH, "Write a checkpoint every so many steps; 0 writes none."
    )
    keep_checkpoints: int = _setting(2, _WATCH, "Checkpoints kept; older ones are removed.")
    log_every: int = _setting(1, _WATCH, "Write metrics every so many steps.")
    plot: bool = _setting(True, _WATCH, "Draw loss.png.")
    resume: bool = _setting(False, _WATCH, "Go on from the newest good checkpoint in output.")
    overwrite: bool = _setting(False, _WATCH, "Start anew where output holds an earlier run.")

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for setting in dataclasses.fields(self):
            value = _coerced(setting.name, getattr(self, setting.name), hints[setting.name])
            object.__setattr__(self, setting.name, value)
        for name, wanted, holds in _RANGES:
            if not holds(value := getattr(self, name)):
                raise ConfigError(f"{name} must be {wanted}, got {value!r}")
        if self.group_by_length and self.packing:
            raise ConfigError("group_by_length has no meaning with packing; set packing to false")
        if self.resume and self.overwrite:
            raise ConfigError("resume goes on with the earlier run, overwrite removes it; take one")

    @staticmethod
    def from_mapping(values: dict[str, Any], source: str = "settings") -> TrainConfig:
        """Settings by name, for instance from YAML; unknown names are an error."""
        known = [setting.name for setting in dataclasses.fields(TrainConfig)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{source}: unknown setting {name!r}{_nearest(name, known)}")
        return TrainConfig(**values)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings that would make a continuation of a run with `other` compute something else."""
        mine = self.as_dict()
        return [
            f"{name}: was {_shown(other.get(name))}, now {_shown(mine[name])}"
            for name in mine
            if name not in HARMLESS and _plain(mine[name]) != _plain(other.get(name))
        ]


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: value >= low


_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("held_out", "at least 0", _at_least(0)),
    ("blocksize", "a power of two from 32 to 4096", lambda v: v in [2**i for i in range(5, 13)]),
    ("r", "at least 1", _at_least(1)),
    ("alpha", "above 0", lambda v: v > 0),
    ("dropout", "from 0 to below 1", lambda v: 0 <= v < 1),
    ("max_length", "at least 2", _at_least(2)),
    ("batch_size", "at least 1", _at_least(1)),
    ("gradient_accumulation", "at least 1", _at_least(1)),
    ("epochs", "above 0", lambda v: v > 0),
    ("steps", "at least 1", lambda v: v is None or v >= 1),
    ("optim_memory", "'auto', a number of bytes, or text like '2GB'", lambda v: is_budget(v)),
    ("optim_paged_from", "at least 0", _at_least(0)),
    ("learning_rate", "above 0", lambda v: v > 0),
    ("warmup", "at least 0", _at_least(0)),
    ("weight_decay", "at least 0", _at_least(0)),
    ("adam_beta1", "from 0 to below 1", lambda v: 0 <= v < 1),
    ("adam_beta2", "from 0 to below 1", lambda v: 0 <= v < 1),
    ("adam_eps", "above 0", lambda v: v > 0),
    ("max_grad_norm", "at least 0", _at_least(0)),
    ("seed", "from 0 to 2**31 - 1", lambda v: 0 <= v < 2**31),
    ("threads", "at least 1", lambda v: v is None or v >= 1),
    ("eval_every", "at least 1", lambda v: v is None or v >= 1),
    ("checkpoint_every", "at least 0", _at_least(0)),
    ("keep_checkpoints", "at least 1", _at_least(1)),
    ("log_every", "at least 1", _at_least(1)),
)


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its setting; YAML's `2e-4` (a string) and `1` for 1.0 are accepted."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            wanted = ", ".join(map(repr, get_args(hint)))
            raise ConfigError(f"{name} must be one of {wanted}, got {value!r}")
        return value
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str | Path) else value
        if not isinstance(items, list | tuple) or not all(isinstance(i, str | Path) for i in items):
            raise ConfigError(f"{name} must be a list of strings, got {value!r}")
        return tuple(str(item) for item in items)
    optional = type(None) in get_args(hint)
    kind = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
    if value is None and optional:
        return None
    if kind is str and isinstance(value, str | Path):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if kind is float and abs(number) < float("inf"):
            return number
        if kind is int and number.is_integer():
            return int(number)
    kinds = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
    raise ConfigError(f"{name} must be {kinds[kind]}, got {value!r}")


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)
