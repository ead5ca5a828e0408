"""A quantized weight under the keys of bitsandbytes' serialized Linear4bit, byte for byte.

    <prefix>absmax            fp32 [n_blocks], or uint8 codes where the scales are double-quantized
    <prefix>quant_map         fp32 [16], the value of each code
    <prefix>nested_absmax     fp32 [ceil(n_blocks/256)]     double-quantized only, as the next
    <prefix>nested_quant_map  fp32 [256], the value of each scale's code
    <prefix>quant_state.bitsandbytes__nf4 (or __fp4)        uint8, the rest as UTF-8 JSON

`prefix` is "weight." within a module; the packed codes stand under "weight" itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.quant_state import (
    BLOCKSIZES,
    FORMATS,
    NESTED_BLOCKSIZE,
    WEIGHT_DTYPES,
    QuantState,
)

_BLOB = "quant_state.bitsandbytes__"
_DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}

# Maps of older torch versions differ in the last bit (linspace); another map differs by far more.
_MAP_TOLERANCE = 1e-6

_MAX_NUMEL = 2**62
_FLOAT32_MAX = torch.finfo(torch.float32).max


def _codebook(format: str) -> Tensor:
    return torch.tensor(_core.codebook(format), dtype=torch.float32, device="cpu")


def _dynamic_map() -> Tensor:
    return torch.tensor(_core.dynamic_map(True), dtype=torch.float32, device="cpu")


def write(state: QuantState, prefix: str = "weight.") -> dict[str, Tensor]:
    """The state under bitsandbytes' keys, in its order. The packed codes are not among them.

    On the meta device the keys and dtypes are right; the JSON is of no use.
    """
    meta = state.absmax.is_meta
    settings: dict[str, object] = {
        "quant_type": state.format,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    tensors = {
        "absmax": state.absmax.reshape(-1),
        "quant_map": _codebook(state.format).to(state.device, copy=True),
    }
    if state.nested_absmax is not None and state.nested_offset is not None:
        settings |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": None if meta else state.nested_offset.item(),
        }
        tensors["nested_absmax"] = state.nested_absmax
        tensors["nested_quant_map"] = _dynamic_map().to(state.device, copy=True)
    text = json.dumps(settings).encode()
    blob = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    tensors[_BLOB + state.format] = blob.to("meta") if meta else blob
    return {prefix + name: tensor for name, tensor in tensors.items()}


def read(tensors: Mapping[str, Tensor], prefix: str = "weight.") -> QuantState:
    """The state read from bitsandbytes' keys; other keys of `tensors` are ignored.

    Raises KeyError naming what is missing, ValueError or TypeError naming the key that is
    wrong, what came and what is wanted.
    """
    blob_keys = [key for key in tensors if key.startswith(prefix + _BLOB)]
    wanted = " or ".join(prefix + _BLOB + format for format in FORMATS)
    if not blob_keys:
        raise KeyError(f"no key {wanted}: not a 4-bit weight, or half of one")
    if len(blob_keys) > 1:
        raise ValueError(f"one key {wanted} is wanted, got {sorted(blob_keys)}")
    settings = _Settings.parse(blob_keys[0], tensors[blob_keys[0]])

    def part(name: str) -> Tensor:
        if prefix + name not in tensors:
            raise KeyError(f"key {prefix + name} is missing beside {blob_keys[0]}")
        return tensors[prefix + name]

    quant_map = part("quant_map")
    _require_map(quant_map, prefix + "quant_map", _codebook(settings.format), settings.format)
    nested_absmax = nested_offset = None
    absmax = part("absmax")
    if settings.nested_offset is not None:
        nested_map = part("nested_quant_map")
        _require_map(nested_map, prefix + "nested_quant_map", _dynamic_map(), "signed dynamic")
        nested_absmax = part("nested_absmax")
        nested_offset = torch.tensor(
            [settings.nested_offset], dtype=torch.float32, device=absmax.device
        )
    elif absmax.dtype == torch.uint8:
        raise ValueError(
            f"{prefix}absmax is uint8, so double-quantized, but {blob_keys[0]} has no "
            "nested_blocksize, nested_dtype and nested_offset"
        )
    try:
        return QuantState(
            absmax=absmax.reshape(-1),
            shape=settings.shape,
            dtype=settings.dtype,
            blocksize=settings.blocksize,
            format=settings.format,
            nested_absmax=None if nested_absmax is None else nested_absmax.reshape(-1),
            nested_offset=nested_offset,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{prefix}{error}") from None


@dataclass
class _Settings:
    """The JSON of the quant_state key, checked."""

    format: str
    blocksize: int
    dtype: torch.dtype
    shape: torch.Size
    nested_offset: float | None

    @classmethod
    def parse(cls, key: str, blob: Tensor) -> _Settings:
        if blob.dtype != torch.uint8 or blob.dim() != 1:
            raise TypeError(
                f"{key} must be uint8 [n], UTF-8 JSON, got {blob.dtype} {list(blob.shape)}"
            )
        text = bytes(blob.tolist())
        try:
            settings = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} is not whole UTF-8 JSON ({error}): {text[:80]!r}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{key} must be a JSON object, got {text[:80]!r}")

        def require(name: str, holds: bool, wanted: str) -> Any:
            if name not in settings:
                raise ValueError(f"{key} lacks {name!r}: it has {sorted(settings)}")
            if not holds:
                raise ValueError(f"{key}: {name} must be {wanted}, got {settings[name]!r}")
            return settings[name]

        got = settings.get
        shape = got("shape")
        is_shape = (
            isinstance(shape, list) and all(map(_is_size, shape)) and math.prod(shape) <= _MAX_NUMEL
        )
        dtype_names = list(_DTYPE_BY_NAME)
        format = key.rsplit("__", 1)[-1]
        if format not in FORMATS:
            raise ValueError(f"{key}: format must be one of {FORMATS}, got {format!r}")
        nested_offset = None
        if any(name.startswith("nested_") for name in settings):
            offset = got("nested_offset")
            is_number = isinstance(offset, float) or (
                isinstance(offset, int) and not isinstance(offset, bool) and abs(offset) < 2**53
            )
            require("nested_blocksize", got("nested_blocksize") == NESTED_BLOCKSIZE, "256")
            require("nested_dtype", got("nested_dtype") == "float32", "'float32'")
            nested_offset = float(require("nested_offset", is_number, "a number"))
            if not abs(nested_offset) <= _FLOAT32_MAX:
                raise ValueError(
                    f"{key}: nested_offset is {nested_offset}: the weight was quantized from "
                    "values with Inf or NaN and all of its scales are lost; quantize it again"
                )
        return cls(
            format=require("quant_type", got("quant_type") == format, f"{format!r}, as in the key"),
            blocksize=require(
                "blocksize",
                _is_size(got("blocksize")) and got("blocksize") in BLOCKSIZES,
                f"one of {BLOCKSIZES}",
            ),
            dtype=_DTYPE_BY_NAME[
                require("dtype", got("dtype") in dtype_names, f"one of {dtype_names}")
            ],
            shape=torch.Size(require("shape", is_shape, "a list of sizes")),
            nested_offset=nested_offset,
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMEL


def _require_map(given: Tensor, key: str, wanted: Tensor, what: str) -> None:
    if given.dtype != torch.float32 or given.shape != wanted.shape:
        raise ValueError(
            f"{key} must be float32 [{wanted.numel()}], got {given.dtype} {list(given.shape)}"
        )
    if given.is_meta:
        return
    difference = (given.cpu() - wanted).abs()
    if not bool((difference <= _MAP_TOLERANCE).all()):
        worst = int(difference.nan_to_num(nan=torch.inf).argmax())
        raise ValueError(
            f"{key} must be the {what} map; entry {worst} is {given[worst].item()}, "
            f"not {wanted[worst].item()}"
        )
