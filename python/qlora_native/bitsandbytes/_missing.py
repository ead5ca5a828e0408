"""What bitsandbytes has and this package has not: using it raises an error that names it.

A class that other libraries import or test with isinstance stands here as one that cannot be
made; any other name is an attribute that is not there, as hasattr and try-import expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

_WHERE = "docs/integrations.md lists what there is"


def refuse(name: str, remedy: str) -> NoReturn:
    """Raise NotImplementedError for bitsandbytes' `name`."""
    raise NotImplementedError(f"qlora_native.bitsandbytes has no {name}: {remedy} ({_WHERE})")


def missing_class(name: str, module: str, remedy: str, base: type = object) -> type:
    """A class of that name which no call can make an object of."""

    def __new__(cls: type, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(name, remedy)

    doc = f"Not here: {remedy}."
    return type(name, (base,), {"__new__": __new__, "__doc__": doc, "__module__": module})


def attributes(module: str, missing: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """A module's `__getattr__` that says of the names in `missing` why they are not there."""

    def __getattr__(name: str) -> NoReturn:
        if name in missing:
            raise AttributeError(f"{module} has no {name}: {missing[name]} ({_WHERE})")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


LLM_INT8 = "8-bit layers (LLM.int8) are not built; load the model in 4 bits"
