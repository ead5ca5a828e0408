"""`QLoRALinear`: a frozen 4-bit linear with a trainable low-rank adapter, in one op.

    LoRA (Hu et al., 2021)    y = x W^T + bias + scaling * (drop(x) A^T) B^T
    DoRA (Liu et al., 2024)   y = (m / ||W + D||) * x (W + D)^T + bias with D = scaling * B A

W, in 4 bits, cannot hold W + scaling * B A exactly. `merged_weight` gives that sum as floats;
`merge` puts its re-quantized form beside the base, which stays as it is, so that `unmerge` restores
every bit and a state dict is the same merged or not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native import autograd
from qlora_native._autocast import lowered
from qlora_native.functional import linear_4bit, quantize_4bit
from qlora_native.linear import Linear4bit
from qlora_native.quant_state import QuantState
from qlora_native.requantize import SeededGenerators, requantize_4bit


class QLoRALinear(Linear4bit):
    """A Linear4bit with LoRA. Made of one by `from_base`; the constructor initializes a base too.

    Args:
        r: rank, at least 1.
        alpha: the adapter is scaled by alpha / r.
        dropout: share of the adapter's input that is zeroed in training mode, in [0, 1). The mask
            is a function of a seed drawn from torch's generator: it is not stored, and gradient
            checkpointing draws the same one again.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski, 2023).
        use_dora: learn each output's magnitude apart from its direction (Liu et al., 2024).
        adapter_dtype: of lora_A, lora_B and lora_magnitude.
        base: further arguments are Linear4bit's.

    lora_A [r, in_features] is initialized as nn.Linear's weight is, lora_B [out_features, r] with
    zeros, as PEFT does, so that a new adapter changes nothing.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None  # [out_features], DoRA only
    merged_packed: Tensor | None
    merged_absmax: Tensor | None
    merged_nested_absmax: Tensor | None
    merged_nested_offset: Tensor | None
    row_norm_sq: Tensor | None  # of the base weight, fp32 [out_features], once DoRA asked for it

    _kept_dtype = (
        *Linear4bit._kept_dtype,
        "merged_packed",
        "merged_absmax",
        "merged_nested_absmax",
        "merged_nested_offset",
        "row_norm_sq",
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        **base: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **base)
        self._add_adapter(r, alpha, dropout, use_rslora, use_dora, adapter_dtype)

    @classmethod
    def from_base(
        cls,
        base: Linear4bit,
        *,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> QLoRALinear:
        """`base` with a new adapter. The tensors of `base` are used, not copied."""
        layer = cls.__new__(cls)
        layer._init_as(base)
        layer._add_adapter(r, alpha, dropout, use_rslora, use_dora, adapter_dtype)
        return layer

    def base(self) -> Linear4bit:
        """The layer without its adapter. The tensors are this one's, not copies."""
        layer = Linear4bit.__new__(Linear4bit)
        layer._init_as(self)
        return layer

    def _add_adapter(
        self,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        use_dora: bool,
        dtype: torch.dtype,
    ) -> None:
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be an integer of at least 1, got {r!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha!r}")
        self.r = r
        self.alpha = alpha
        self.dropout = float(dropout)
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.adapter_enabled = True
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, dtype=dtype, device=device))
        magnitude = torch.empty(self.out_features, dtype=dtype, device=device)
        self.lora_magnitude = nn.Parameter(magnitude) if use_dora else None
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """A new adapter, of no effect."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None and not self.weight.is_meta:
            self.lora_magnitude.copy_(self._row_norm_sq().sqrt())

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self.reset_adapter()

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype, or in autocast's under it."""
        if not self.adapter_enabled:
            return super().forward(x)
        self._require_loaded(x)
        if self.merged_packed is not None:
            return self._forward_merged(x)
        if self.lora_magnitude is not None:
            return self._forward_dora(x, self.lora_magnitude)
        return self._lora(x, self.bias, self.dropout if self.training else 0.0)

    def _lora(self, x: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        seed = None
        if dropout > 0.0:
            seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)
        return autograd.qlora_linear(
            x,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.blocksize,
            self.format,
            bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            dropout,
            seed,
        )

    # ---- DoRA ----

    def _forward_dora(self, x: Tensor, magnitude: Tensor) -> Tensor:
        x = lowered(x)
        gain = (magnitude / self._merged_row_norm().to(magnitude.dtype)).to(x.dtype)
        if self.training and self.dropout > 0.0:
            # As PEFT has it: the base sees x whole, what the magnitude changes of it dropped.
            dropped = F.dropout(x, self.dropout)
            base_of_dropped = linear_4bit(dropped, self.weight, self.quant_state)
            return super().forward(x) + gain * self._lora(dropped, None, 0.0) - base_of_dropped
        y = gain * self._lora(x, None, 0.0)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def _merged_row_norm(self) -> Tensor:
        """||W + scaling * B A|| by rows, fp32 [out_features]; DoRA takes it as a constant (4.3).

        ||w + d||^2 = ||w||^2 + 2 w.d + ||d||^2 with d = scaling * b A. W A^T is a product with the
        4-bit weight, so neither W nor B A is ever written out.
        """
        a, b = self.lora_A.float(), self.lora_B.float()
        wa = linear_4bit(a, self.weight, self.quant_state).T
        twice_wd_and_dd = (2.0 * wa + self.scaling * (b @ (a @ a.T))) * b
        norm_sq = self._row_norm_sq() + self.scaling * twice_wd_and_dd.sum(1)
        return norm_sq.clamp(min=0.0).sqrt()

    def _row_norm_sq(self) -> Tensor:
        if self.row_norm_sq is None:
            self.row_norm_sq = self.dequantize(torch.float32).square().sum(1)
        return self.row_norm_sq

    # ---- merging ----

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that base and adapter amount to, [out_features, in_features].

        Summed in float32, then rounded to dtype.
        """
        weight = self.dequantize(torch.float32)
        weight.addmm_(self.lora_B.float(), self.lora_A.float(), alpha=self.scaling)
        if self.lora_magnitude is not None:
            weight *= (self.lora_magnitude.float() / self._merged_row_norm()).unsqueeze(1)
        return weight.to(dtype)

    @property
    def merged(self) -> bool:
        """Whether forward uses the merged weight."""
        return self.merged_packed is not None

    @property
    def merged_state(self) -> QuantState:
        """Scales and layout of the merged weight."""
        if self.merged_absmax is None:
            raise RuntimeError("merged_state: the layer is not merged")
        return replace(
            self.quant_state,
            absmax=self.merged_absmax,
            nested_absmax=self.merged_nested_absmax,
            nested_offset=self.merged_nested_offset,
        )

    @torch.no_grad()
    def quantized_again(
        self, rounding: str = "stochastic", generator: torch.Generator | None = None
    ) -> tuple[Tensor, QuantState]:
        """`merged_weight` in 4 bits: packed codes and their state.

        Args:
            rounding: "stochastic", on the base's scales, keeps the adapter's change on average
                (requantize.py) but clips what grows beyond them; "nearest", on new scales, rounds
                a small change away, and is the better of the two where D is above some 10 % of W.
            generator: of the stochastic rounding; seeded with 0 if None.
        """
        merged = self.merged_weight()
        if rounding == "nearest":
            return quantize_4bit(
                merged,
                self.blocksize,
                self.format,
                self.double_quant,
                scale_rounding=self.scale_rounding,
                name="the merged weight",
            )
        if rounding != "stochastic":
            raise ValueError(f"rounding must be 'stochastic' or 'nearest', got {rounding!r}")
        if not bool(torch.isfinite(merged).all()):
            raise ValueError("the merged weight must be finite, got NaN or Inf in the adapter")
        if generator is None:
            generator = SeededGenerators()[merged.device]
        state = self.quant_state
        return requantize_4bit(merged, state, generator), state.to(merged.device, copy=True)

    def merge(self, rounding: str = "stochastic", generator: torch.Generator | None = None) -> None:
        """Let forward use W + scaling * B A, quantized again: one product and no adapter.

        Arguments are quantized_again's; merging.py measures what the rounding costs. The adapter
        may change meanwhile, to no effect until `unmerge`. A merged layer stays as it is.
        """
        if self.merged:
            return
        packed, state = self.quantized_again(rounding, generator)
        self.merged_packed = packed
        self.merged_absmax = state.absmax
        self.merged_nested_absmax = state.nested_absmax
        self.merged_nested_offset = state.nested_offset

    def unmerge(self) -> None:
        """Let forward use base and adapter again, which merging left as they were to the bit."""
        self._drop_merged()

    def _drop_merged(self) -> None:
        self.merged_packed = self.merged_absmax = None
        self.merged_nested_absmax = self.merged_nested_offset = None

    def _forward_merged(self, x: Tensor) -> Tensor:
        assert self.merged_packed is not None
        return linear_4bit(x, self.merged_packed, self.merged_state, self.bias)

    # ---- bookkeeping ----

    def _set_quantized(self, packed: Tensor, state: QuantState) -> None:
        super()._set_quantized(packed, state)
        self._drop_merged()
        self.row_norm_sq = None

    def extra_repr(self) -> str:
        flags = "".join(
            f", {name}=True" for name in ("use_rslora", "use_dora", "merged") if getattr(self, name)
        )
        return (
            f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}, dropout={self.dropout}{flags}"
        )
