"""What a model's parameters weigh, counted from the bytes that its tensors hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qlora_native.linear import Linear4bit
from qlora_native.lora import QLoRALinear


@dataclass(frozen=True)
class Footprint:
    """Parameters and bytes of a model. Shared tensors count once.

    n_quantized    values held in 4 bits       quantized_bytes  their codes and scales
    n_trainable    parameters that learn       trainable_bytes
    n_other        the rest: embeddings, norms, heads, frozen adapters        other_bytes
    merged_bytes   second copies of the weights of layers that are merged
    """

    n_quantized: int
    n_trainable: int
    n_other: int
    quantized_bytes: int
    trainable_bytes: int
    other_bytes: int
    merged_bytes: int

    @property
    def n_parameters(self) -> int:
        """All of them."""
        return self.n_quantized + self.n_trainable + self.n_other

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.quantized_bytes + self.trainable_bytes + self.other_bytes + self.merged_bytes

    @property
    def bits_per_quantized_parameter(self) -> float:
        """Codes and scales; 4.127 for NF4, blocks of 64, double-quantized."""
        return 8 * self.quantized_bytes / self.n_quantized if self.n_quantized else 0.0

    def __str__(self) -> str:
        mib = 1024**2
        return (
            f"{self.n_parameters:,} parameters in {self.total_bytes / mib:,.1f} MiB: "
            f"{self.n_quantized:,} quantized at {self.bits_per_quantized_parameter:.3f} bits "
            f"({self.quantized_bytes / mib:,.1f} MiB), {self.n_trainable:,} trainable "
            f"({self.trainable_bytes / mib:,.1f} MiB), {self.n_other:,} other "
            f"({self.other_bytes / mib:,.1f} MiB)"
        )


def footprint(model: nn.Module) -> Footprint:
    """Count what `model` holds."""
    seen: set[int] = set()

    def fresh(tensor: Tensor | None) -> int:
        """Bytes of a tensor that was not counted yet."""
        if tensor is None or id(tensor) in seen:
            return 0
        seen.add(id(tensor))
        return tensor.nbytes

    n_quantized = quantized_bytes = merged_bytes = 0
    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        if codes := fresh(module.weight):
            n_quantized += module.shape.numel()
            quantized_bytes += codes + sum(map(fresh, module.quant_state.tensors().values()))
        if isinstance(module, QLoRALinear) and module.merged:
            merged_bytes += fresh(module.merged_packed)
            merged_bytes += sum(map(fresh, module.merged_state.tensors().values()))

    counts = {True: [0, 0], False: [0, 0]}  # trainable -> parameters, bytes
    for parameter in model.parameters():
        counts[parameter.requires_grad][0] += parameter.numel()
        counts[parameter.requires_grad][1] += fresh(parameter)
    return Footprint(
        n_quantized=n_quantized,
        n_trainable=counts[True][0],
        n_other=counts[False][0],
        quantized_bytes=quantized_bytes,
        trainable_bytes=counts[True][1],
        other_bytes=counts[False][1],
        merged_bytes=merged_bytes,
    )
