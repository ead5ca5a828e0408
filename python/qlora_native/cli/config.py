"""`--config FILE`: a YAML file with a command's options; what stands on the command line wins.

The file's keys are the options' names without the dashes in front (`batch-size` or `batch_size`); a
key that no option bears is refused with the nearest names, because a misspelt setting must not be
ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_native.cli.errors import fail
from qlora_native.loading.errors import near_misses


def _apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command's options."""
    if path is None or context.resilient_parsing:
        return path
    known = {
        parameter.name
        for parameter in context.command.params
        if parameter.name is not None and parameter.name not in ("config", "help")
    }
    defaults = {}
    for key, value in _read_mapping(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            options = sorted(option.replace("_", "-") for option in known)
            hint = (
                near_misses(name.replace("_", "-"), options) or f"; known are {', '.join(options)}"
            )
            fail(f"{path}: unknown setting {key!r}{hint}")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _read_mapping(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"{path} is not valid YAML: {' '.join(str(error).split())}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        fail(f"{path} must hold `setting: value` lines, got {type(content).__name__}")
    return content


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file with any of these options (`batch-size: 4`); flags given here win over it.",
        callback=_apply,
        is_eager=True,
        show_default=False,
    ),
]
