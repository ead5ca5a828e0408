"""What turns packed 4-bit codes back into values, and its form in a file.

A `QuantState` holds the scales as plain tensors, so it moves between devices, pickles, deep-copies
and goes through safetensors like any other tensors. `to_bnb_dict` / `from_bnb_dict` write and read
the keys of bitsandbytes' serialized Linear4bit, byte for byte:

    <prefix>absmax            fp32 [n_blocks], or uint8 codes where the scales are double-quantized
    <prefix>quant_map         fp32 [16], the value of each code
    <prefix>nested_absmax     fp32 [ceil(n_blocks/256)]     double-quantized only, as the next
    <prefix>nested_quant_map  fp32 [256], the value of each scale's code
    <prefix>quant_state.bitsandbytes__nf4 (or __fp4)        uint8, the rest as UTF-8 JSON
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_native import _core

FORMATS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_BLOB = "quant_state.bitsandbytes__"
_DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}

# Maps of older torch versions differ in the last bit (linspace); another map differs by far more.
_MAP_TOLERANCE = 1e-6

_MAX_NUMEL = 2**62
_FLOAT32_MAX = torch.finfo(torch.float32).max


@cache
def _codebook(format: str) -> Tensor:
    return torch.tensor(_core.codebook(format), dtype=torch.float32)


@cache
def _dynamic_map() -> Tensor:
    return torch.tensor(_core.dynamic_map(True), dtype=torch.float32)


@dataclass(eq=False)
class QuantState:
    """Scales and layout of one 4-bit tensor.

    absmax         fp32 [n_blocks]; uint8 codes of the signed dynamic map when double-quantized
    shape, dtype   of the tensor that was quantized
    blocksize      values that share a scale: a power of two, 32 to 4096
    format         "nf4" or "fp4"
    nested_absmax  fp32 [ceil(n_blocks/256)], double-quantized only, as the next
    nested_offset  fp32 [1], the mean of the scales

    Raises ValueError or TypeError when the parts do not fit together.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    format: str
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = torch.Size(self.shape)
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {self.format!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize!r}")
        if self.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype must be one of {WEIGHT_DTYPES}, got {self.dtype}")
        if (self.nested_absmax is None) != (self.nested_offset is None):
            raise ValueError("nested_absmax and nested_offset must be given together or not at all")
        scale_dtype = torch.uint8 if self.double_quant else torch.float32
        _require(self.absmax, "absmax", scale_dtype, self.n_blocks)
        if self.nested_absmax is not None and self.nested_offset is not None:
            n_nested = -(-self.n_blocks // NESTED_BLOCKSIZE)
            _require(self.nested_absmax, "nested_absmax", torch.float32, n_nested)
            _require(self.nested_offset, "nested_offset", torch.float32, 1)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def n_blocks(self) -> int:
        """Number of scales."""
        return -(-self.shape.numel() // self.blocksize)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the packed codes: two to a byte."""
        return (-(-self.shape.numel() // 2), 1)

    @property
    def device(self) -> torch.device:
        """Where the scales are."""
        return self.absmax.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the scales (not by the packed codes)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by field name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def to(
        self, device: torch.device | str, non_blocking: bool = False, copy: bool = False
    ) -> QuantState:
        """This state with its tensors on `device`; dtypes never change."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking, copy=copy)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def __eq__(self, other: object) -> bool:
        """Same layout and the same scales to the bit (a NaN equals itself)."""
        if not isinstance(other, QuantState):
            return NotImplemented
        mine, others = self.tensors(), other.tensors()
        layout = ("shape", "dtype", "blocksize", "format")
        return (
            all(getattr(self, name) == getattr(other, name) for name in layout)
            and mine.keys() == others.keys()
            and all(_same_bits(mine[name], others[name]) for name in mine)
        )

    __hash__ = None  # type: ignore[assignment]

    def check_packed(self, packed: Tensor, name: str = "packed") -> Tensor:
        """`packed` as uint8 [ceil(n/2), 1]; any storage dtype viewing the same bytes is taken.

        Raises ValueError when it holds another number of bytes than the shape asks for.
        """
        wanted = self.packed_shape[0]
        if packed.nbytes != wanted:
            raise ValueError(
                f"{name} must hold {wanted} bytes for shape {list(self.shape)} at 4 bits a value, "
                f"got {packed.nbytes} bytes ({packed.dtype} {list(packed.shape)})"
            )
        if packed.dtype == torch.uint8 and packed.shape == (wanted, 1) and packed.is_contiguous():
            return packed
        return packed.contiguous().view(-1).view(torch.uint8).view(wanted, 1)

    def to_bnb_dict(self, prefix: str = "weight.") -> dict[str, Tensor]:
        """The state under bitsandbytes' keys, in its order. The packed codes are not among them.

        On the meta device the keys and dtypes are right; the JSON is of no use.
        """
        meta = self.absmax.is_meta
        settings: dict[str, object] = {
            "quant_type": self.format,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {
            "absmax": self.absmax.view(-1),
            "quant_map": _codebook(self.format).to(self.device, copy=True),
        }
        if self.nested_absmax is not None and self.nested_offset is not None:
            settings |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": None if meta else self.nested_offset.item(),
            }
            tensors["nested_absmax"] = self.nested_absmax
            tensors["nested_quant_map"] = _dynamic_map().to(self.device, copy=True)
        blob = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        tensors[_BLOB + self.format] = blob.to("meta") if meta else blob
        return {prefix + name: tensor for name, tensor in tensors.items()}

    @classmethod
    def from_bnb_dict(cls, tensors: Mapping[str, Tensor], prefix: str = "weight.") -> QuantState:
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
            return cls(
                absmax=absmax.view(-1),
                shape=settings.shape,
                dtype=settings.dtype,
                blocksize=settings.blocksize,
                format=settings.format,
                nested_absmax=None if nested_absmax is None else nested_absmax.view(-1),
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
        except ValueError as error:
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
        is_shape = isinstance(shape, list) and all(map(_is_size, shape))
        is_shape = is_shape and math.prod(shape) <= _MAX_NUMEL
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


def _require(tensor: Tensor, name: str, dtype: torch.dtype, numel: int) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != (numel,):
        raise ValueError(f"{name} must have shape [{numel}], got {list(tensor.shape)}")


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


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.to(a.device).contiguous().view(torch.uint8)
    )
