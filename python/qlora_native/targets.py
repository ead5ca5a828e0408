"""Which modules an adapter goes on: PEFT's rules for names, and what to say when none match.

A list matches a module whose dotted name is an entry or ends with "." + entry; a string is a
regular expression for the whole name; "all-linear" is every candidate but the output embeddings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

ALL_LINEAR = "all-linear"

T = TypeVar("T")


def matches(name: str, targets: str | Iterable[str]) -> bool:
    """Whether a regular expression, or an entry of a list, means this module."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern (of rank_pattern, alpha_pattern) that ends this name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def select(
    candidates: Sequence[str],
    targets: str | Sequence[str],
    *,
    exclude: str | Sequence[str] = (),
    all_names: Sequence[str] = (),
    never: Sequence[str] = (),
) -> list[str]:
    """The candidates that targets mean, less exclude and, for "all-linear", less never.

    Raises ValueError where nothing matches, or an entry of a list matches nothing, naming what
    comes near among candidates, and what matches among all_names without being a candidate.
    """
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = [name for name in candidates if name not in never]
    else:
        for target in [targets] if isinstance(targets, str) else targets:
            entry = target if isinstance(targets, str) else [target]
            if not any(matches(name, entry) for name in candidates):
                raise ValueError(_no_match(target, entry, candidates, all_names))
        chosen = [name for name in candidates if matches(name, targets)]
    if exclude:
        chosen = [name for name in chosen if not matches(name, exclude)]
    if not chosen:
        raise ValueError(
            f"targets={targets!r} less exclude={exclude!r} leaves none of the {len(candidates)} "
            f"quantized linears ({_some(candidates)})"
        )
    return chosen


def output_embedding_names(model: nn.Module) -> list[str]:
    """Names of the head that turns hidden states into logits, where the model tells it."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        return []
    return [name for name, module in model.named_modules() if module is head]


def near(wanted: str, names: Iterable[str]) -> list[str]:
    """Names, or last parts of names, that look like the wanted one."""
    names = list(names)
    pool = dict.fromkeys([name.rsplit(".", 1)[-1] for name in names] + names)
    return difflib.get_close_matches(wanted, pool, n=3, cutoff=0.6)


def _no_match(
    target: str, entry: str | list[str], candidates: Sequence[str], all_names: Sequence[str]
) -> str:
    message = f"target {target!r} matches no quantized linear"
    elsewhere = [name for name in all_names if matches(name, entry)]
    if elsewhere:
        return (
            f"{message}: it means {_some(elsewhere)}, which is not quantized, so cannot hold an "
            "adapter; quantize it first (quantize's skip) or leave it out of targets"
        )
    close = near(target, candidates)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {_some(candidates)}"
    )
    return f"{message}: {hint}"


def _some(names: Iterable[str], n: int = 8) -> str:
    """The distinct last parts of names, the first few."""
    parts = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return ", ".join(parts[:n]) + (", …" if len(parts) > n else "") if parts else "none"
