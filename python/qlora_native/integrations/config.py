"""`QLoRANativeConfig`: how from_pretrained is to quantize, or has found a folder quantized."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_native.quant_state import BLOCKSIZES, FORMATS, WEIGHT_DTYPES

METHOD = "qlora_native"
_SCALE_ROUNDINGS = ("nearest", "bitsandbytes_cpu")


class QLoRANativeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What to pass to transformers' from_pretrained(quantization_config=…).

    Args:
        format: "nf4" or "fp4".
        double_quant: whether the scales are quantized too.
        blocksize: values that share a scale: a power of two, 32 to 4096.
        compute_dtype: that the 4-bit products take their input in, as a torch.dtype or its name;
            None: the input's own (under autocast, autocast's).
        skip_modules: names to leave as they are, by transformers' rule (from the start, as a
            regular expression, or at the end of a module's name). None: what transformers leaves,
            which is the output embeddings, what is tied, and the last module.
        scale_rounding: "nearest", or "bitsandbytes_cpu" for the codes that bitsandbytes gives
            double-quantized scales on a CPU (functional.quantize_4bit).

    Raises ValueError or TypeError naming the argument, what came and what is wanted.
    """

    def __init__(
        self,
        format: str = "nf4",
        double_quant: bool = True,
        blocksize: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: Sequence[str] | None = None,
        scale_rounding: str = "nearest",
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(
                f"QLoRANativeConfig has no {', '.join(map(repr, sorted(unknown)))}: it has format, "
                "double_quant, blocksize, compute_dtype, skip_modules and scale_rounding"
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        _require(format in FORMATS, "format", f"one of {FORMATS}", format)
        _require(isinstance(double_quant, bool), "double_quant", "a bool", double_quant)
        _require(blocksize in BLOCKSIZES, "blocksize", f"one of {BLOCKSIZES}", blocksize)
        names = [skip_modules] if isinstance(skip_modules, str) else skip_modules
        _require(
            names is None or all(isinstance(name, str) for name in names),
            "skip_modules",
            "a list of names",
            skip_modules,
        )
        _require(
            scale_rounding in _SCALE_ROUNDINGS,
            "scale_rounding",
            f"one of {_SCALE_ROUNDINGS}",
            scale_rounding,
        )
        self.quant_method = METHOD
        self.format = format
        self.double_quant = double_quant
        self.blocksize = blocksize
        self.compute_dtype = _dtype(compute_dtype)
        self.skip_modules = None if names is None else list(names)
        self.scale_rounding = scale_rounding

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        values = copy.deepcopy(self.__dict__)
        values["compute_dtype"] = _name(self.compute_dtype)
        return values


class BitsAndBytesFolder(QLoRANativeConfig):
    """The settings of a folder that bitsandbytes' 4-bit layers were saved in.

    Args:
        stored: its quantization_config, which `to_dict` gives back, so that a saved folder is
            bitsandbytes' again.
        compute_dtype: instead of the folder's; None: the input's own.
    """

    def __init__(self, stored: Mapping[str, Any], compute_dtype: torch.dtype | None = None) -> None:
        super().__init__(
            format=stored.get("bnb_4bit_quant_type", "fp4"),
            double_quant=stored.get("bnb_4bit_use_double_quant", False),
            compute_dtype=compute_dtype,
            skip_modules=stored.get("llm_int8_skip_modules"),
        )
        self.stored = dict(stored)

    def to_dict(self) -> dict[str, Any]:
        """As the folder's config.json has it."""
        return copy.deepcopy(self.stored)


def _dtype(compute_dtype: torch.dtype | str | None) -> torch.dtype | None:
    dtypes = {_name(dtype): dtype for dtype in WEIGHT_DTYPES}
    name = _name(compute_dtype) if isinstance(compute_dtype, torch.dtype) else compute_dtype
    known = isinstance(name, str) and name.removeprefix("torch.") in dtypes
    _require(name is None or known, "compute_dtype", f"None or one of {[*dtypes]}", compute_dtype)
    return None if name is None else dtypes[name.removeprefix("torch.")]


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _require(holds: bool, argument: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{argument} must be {wanted}, got {got!r}")
