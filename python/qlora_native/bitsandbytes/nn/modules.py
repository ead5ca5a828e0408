"""Layers on 4-bit weights, `Linear4bit` and its kinds, as bitsandbytes' users know them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.bitsandbytes._missing import LLM_INT8, missing_class
from qlora_native.bitsandbytes.autograd._functions import matmul_4bit
from qlora_native.bitsandbytes.nn.params import Params4bit
from qlora_native.bitsandbytes.quant_state import QuantState, parts_of

logger = logging.getLogger(__name__)

_EMBEDDINGS = "the embedding stays in 16 or 32 bits; use torch.nn.Embedding"

Int8Params = missing_class("Int8Params", __name__, LLM_INT8, nn.Parameter)
Linear8bitLt = missing_class("Linear8bitLt", __name__, LLM_INT8, nn.Linear)
OutlierAwareLinear = missing_class("OutlierAwareLinear", __name__, LLM_INT8, nn.Linear)
Embedding4bit = missing_class("Embedding4bit", __name__, _EMBEDDINGS, nn.Embedding)
Embedding8bit = missing_class("Embedding8bit", __name__, _EMBEDDINGS, nn.Embedding)
EmbeddingFP4 = missing_class("EmbeddingFP4", __name__, _EMBEDDINGS, nn.Embedding)
EmbeddingNF4 = missing_class("EmbeddingNF4", __name__, _EMBEDDINGS, nn.Embedding)
Embedding = missing_class("Embedding", __name__, _EMBEDDINGS, nn.Embedding)
StableEmbedding = missing_class("StableEmbedding", __name__, _EMBEDDINGS, nn.Embedding)


class Linear4bit(nn.Linear):
    """y = x W^T + bias, W [output_features, input_features] frozen, in 4 bits once it was moved.

    Load float weights, then move the layer to a device (a CPU too): that quantizes them.

    Args:
        input_features, output_features: of W.
        bias: whether there is one.
        compute_dtype: what x is cast to; where None, the first x decides: float32 and bfloat16
            are computed in as they are.
        compress_statistics: whether the scales are quantized too.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the bytes of the codes are seen as.
    """

    weight: Params4bit

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def set_compute_type(self, x: Tensor) -> None:
        """Take compute_dtype from the first input, where it was not given."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32):
            logger.warning(
                "Linear4bit got float16 and has no bnb_4bit_compute_dtype=torch.float16: its "
                "output is float16 whatever it computes in"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., input_features] -> [..., output_features], in x's dtype."""
        state = getattr(self.weight, "quant_state", None) or self._restored_state()
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        return matmul_4bit(x, self.weight, state, bias=self.bias).to(dtype)

    def _restored_state(self) -> QuantState:
        """The layer's own quant_state, which outlives a weight that FSDP put in another's place."""
        if self.quant_state is None:
            raise RuntimeError(
                f"the weight of {self} is not quantized: move the layer to a device first, by "
                ".to('cpu') or .cuda()"
            )
        if not isinstance(self.weight, Params4bit):
            self.weight = Params4bit(
                self.weight, quant_storage=self.quant_storage, bnb_quantized=True
            )
        self.weight.quant_state = self.quant_state
        return self.quant_state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load floats to be quantized, or quantized parts, which bitsandbytes refuses."""
        key = prefix + "weight"
        parts = parts_of(state_dict, prefix)
        if not parts or key not in state_dict:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            return
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in parts}
        device = state_dict[key].device if self.weight.is_meta else self.weight.device
        try:
            self.weight = Params4bit.from_prequantized(
                state_dict[key], dict(parts), device=device, module=self
            )
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")
        super()._load_from_state_dict(
            {**rest, key: self.weight},
            prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs,
        )  # fmt: skip


class LinearFP4(Linear4bit):
    """Linear4bit with quant_type "fp4"."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4",
            quant_storage, device,
        )  # fmt: skip


class LinearNF4(Linear4bit):
    """Linear4bit with quant_type "nf4"."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4",
            quant_storage, device,
        )  # fmt: skip
