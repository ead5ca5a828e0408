"""In what form a folder's weights are stored: what the `quantization_config` of its config says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_native.loading.errors import CheckpointError

FLOAT, BITSANDBYTES, FP8, GPTQ, AWQ = "float", "bitsandbytes", "fp8", "gptq", "awq"


@dataclass(frozen=True)
class StoredForm:
    """A method's name and its settings as the config has them.

    Weights in FP8, GPTQ's or AWQ's form are read as the floats that they stand for.
    """

    method: str = FLOAT
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_integer(self) -> bool:
        """Whether the weights have been rounded to some 16 values or fewer already."""
        return self.method in (GPTQ, AWQ)


def stored_form(quantization: dict[str, Any] | Any | None, where: str) -> StoredForm:
    """The form that `quantization_config` names; raises CheckpointError for one with no reader."""
    if not quantization:
        return StoredForm()
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    default = "bitsandbytes" if "load_in_4bit" in values else "unknown"
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", default)))
    kind = method.upper()
    if method == "bitsandbytes":
        if values.get("load_in_4bit"):
            return StoredForm(BITSANDBYTES, values)
        kind = "8-bit bitsandbytes"
    elif method == "gptq" and values.get("bits") in (2, 4, 8):
        return StoredForm(GPTQ, values)
    elif method == "awq" and _is_awq_gemm(values):
        return StoredForm(AWQ, values)
    elif method in ("fp8", "fbgemm_fp8") or _is_compressed_fp8(values):
        return StoredForm(FP8, values)
    raise CheckpointError(
        f"{where} is already quantized by {kind}, which cannot be read: bitsandbytes' 4-bit form, "
        "FP8, GPTQ (2, 4 or 8 bits) and AWQ (4 bits, version gemm) can; take the original, "
        "un-quantized model, which is quantized while it loads"
    )


def refuse_again(form: StoredForm, where: str, measured: str = "") -> None:
    """Raise CheckpointError: the weights have been rounded to integers once already."""
    bits, group = form.settings.get("bits", 4), form.settings.get("group_size", -1)
    raise CheckpointError(
        f"{where} is already quantized by {form.method.upper()} ({bits} bits, groups of "
        f"{group}): to quantize it again compounds the loss{measured}; take the original, "
        "un-quantized model, or go on with requantize=True (qlora-native quantize --requantize)"
    )


def _is_awq_gemm(values: dict[str, Any]) -> bool:
    version = str(getattr(values.get("version"), "value", values.get("version", "gemm")))
    bits = values.get("bits", values.get("w_bit", 4))
    return bits == 4 and version.lower() == "gemm" and values.get("zero_point", True)


def _is_compressed_fp8(values: dict[str, Any]) -> bool:
    """compressed-tensors with FP8 weights, every one of them."""
    groups = (values.get("config_groups") or {}).values()
    weights = [(group.get("weights") or {}) for group in groups]
    return (
        values.get("quant_method") == "compressed-tensors"
        and bool(weights)
        and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)
    )
