"""Puts qlora_native.bitsandbytes in bitsandbytes' place for the whole process.

`import bitsandbytes` finds modules that are loaded already, so each of ours is entered under its
name there; a finder answers importlib.metadata's questions for the version.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

_THEIRS = "bitsandbytes"
_OURS = "qlora_native.bitsandbytes"

# Functions that remember whether bitsandbytes is there, and modules that import it only if it was.
_REMEMBERED = (
    ("transformers.utils.import_utils", "is_bitsandbytes_available"),
    ("peft.import_utils", "is_bnb_available"),
    ("peft.import_utils", "is_bnb_4bit_available"),
)
_DECIDED = ("transformers.integrations.bitsandbytes", "peft.helpers")
# peft's LoRA layers for bitsandbytes, and what gives them the fused op once they are imported.
_PEFT_LAYERS = "peft.tuners.lora.bnb"
_ONE_OP = "qlora_native.integrations.peft_bitsandbytes"


def install_as_bitsandbytes() -> ModuleType:
    """Make `import bitsandbytes` give qlora_native.bitsandbytes from now on, everywhere.

    Call it before anything imports bitsandbytes: peft does, and parts of transformers. Whether the
    real package is installed makes no difference. `importlib.metadata.version("bitsandbytes")`
    gives our __version__. Calling it again does nothing.

    Returns:
        qlora_native.bitsandbytes.

    Raises:
        ImportError: bitsandbytes has been imported already.
    """
    ours = importlib.import_module(_OURS)
    there = sys.modules.get(_THEIRS)
    if there is ours:
        return ours
    if there is not None:
        raise ImportError(
            f"bitsandbytes is imported already, from {getattr(there, '__file__', None)}: call "
            "qlora_native.install_as_bitsandbytes() before whatever imports it (peft, for one), "
            "or run the script by `python -m qlora_native.as_bitsandbytes script.py`"
        )
    from qlora_native.bitsandbytes import _ops

    _ops.define()
    for name in _submodules(ours):
        sys.modules[_THEIRS + name.removeprefix(_OURS)] = importlib.import_module(name)
    sys.meta_path.insert(0, _Metadata())
    if hasattr(sys.modules.get(_PEFT_LAYERS), "Linear4bit"):
        importlib.import_module(_ONE_OP)
    else:
        sys.meta_path.insert(0, _PeftLayers())
    for module_name, function in _REMEMBERED:
        forget = getattr(_loaded(module_name, function), "cache_clear", None)
        if forget is not None:
            forget()
    for module_name in _DECIDED:
        module = sys.modules.get(module_name)
        if module is not None and getattr(module, "bnb", None) is None:
            module.bnb = ours  # type: ignore[attr-defined]
    return ours


def _submodules(package: ModuleType) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package.__name__, *(info.name for info in found)]


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


class _PeftLayers(importlib.abc.MetaPathFinder):
    """Has peft's layers imported as ever, and then _ONE_OP: peft itself may never be."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PEFT_LAYERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenOneOp(spec.loader)
        return spec


class _ThenOneOp(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_ONE_OP)


class _Metadata(importlib.metadata.DistributionFinder):
    """Finds one distribution, bitsandbytes, and no module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        return [_Distribution()] if name in (None, _THEIRS) else []


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata tells of bitsandbytes."""

    def read_text(self, filename: str) -> str | None:
        if filename == "top_level.txt":
            return _THEIRS + "\n"
        if filename != "METADATA":
            return None
        version = sys.modules[_OURS].__version__
        return (
            f"Metadata-Version: 2.1\nName: {_THEIRS}\nVersion: {version}\n"
            "Summary: qlora_native, in bitsandbytes' place\n"
        )

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        from pathlib import Path

        return Path(str(sys.modules[_OURS].__file__)).parent.parent / path
