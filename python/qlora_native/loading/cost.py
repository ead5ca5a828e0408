"""What quantizing costs: the size that is left and the error that it brings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from qlora_native.linear import Linear4bit


@dataclass
class QuantizationCost:
    """Size and error of the weights that were quantized.

    The relative error of a weight is ||W - W4|| / ||W|| (Frobenius); the model's is that of all
    weights taken as one.
    """

    layers: int = 0
    parameters: int = 0
    nbytes: int = 0  # packed codes and scales
    squared_error: float = 0.0
    squared_norm: float = 0.0
    worst: str = ""
    worst_error: float = 0.0

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / max(self.parameters, 1)

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def add(self, name: str, weight: Tensor, layer: Linear4bit) -> None:
        """Count one weight [out_features, in_features], of which `layer` holds the 4-bit form."""
        exact = weight.float()
        error = float((layer.dequantize(exact.dtype) - exact).double().square().sum())
        norm = float(exact.double().square().sum())
        self.layers += 1
        self.parameters += weight.numel()
        self.nbytes += layer.weight.nbytes + layer.quant_state.nbytes
        self.squared_error += error
        self.squared_norm += norm
        relative = math.sqrt(error / norm) if norm else 0.0
        if relative >= self.worst_error:
            self.worst, self.worst_error = name, relative
