"""`LoadingExperts`: an experts module while from_pretrained reads its stacks.

transformers fuses a checkpoint's single experts into a stack and hands that to the quantizer, which
keeps its packed codes here; or it finds the stacks packed, as save_pretrained wrote them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_native.experts import STACKS, Experts4bit, StackedLinear4bit, stacks
from qlora_native.quant_state import QuantState


class LoadingExperts(nn.Module):
    """Has the parameters and submodules of the experts module it stands for."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = (experts,)  # not a submodule
        self.is_transposed = bool(experts.is_transposed)
        self.shapes = {name: parameter.shape for name, parameter in stacks(experts)}
        self.states: dict[str, QuantState] = {}  # stack -> that of its packed codes
        self._parameters.update(experts._parameters)
        self._modules.update(experts._modules)

    def shape(self, stack: str) -> torch.Size:
        """[experts, out, in] of a stack."""
        groups, rows, cols = self.shapes[stack]
        return torch.Size((groups, cols, rows)) if self.is_transposed else self.shapes[stack]

    def missing(self) -> list[str]:
        """Stacks that nothing was loaded for."""
        return [name for name in self.shapes if self.get_parameter(name).is_meta]

    def loaded(self, scale_rounding: str) -> nn.Module:
        """The module, frozen, once its stacks are there: those that came as floats stay floats."""
        (experts,) = self.experts
        experts._parameters.update(self._parameters)
        packed = {}
        for name, state in self.states.items():
            packed[name] = StackedLinear4bit.from_tensors(self.get_parameter(name).data, state)
            packed[name].scale_rounding = scale_rounding
        new = Experts4bit.from_stacks(experts, packed) if packed else experts
        return new.requires_grad_(False)


def packed_names(parts: tuple[str, ...]) -> dict[str, list[str]]:
    """A stack's parameter -> the names that a checkpoint has its packed form under."""
    return {
        f"experts.{stack}": [f"experts.{stack}", *(f"experts.{stack}.{part}" for part in parts)]
        for stack in STACKS
    }


def fuses_experts(conversion: Any) -> bool:
    """Whether a conversion of transformers splits, in reverse, what we save packed."""
    return any(target.rpartition(".")[2] in STACKS for target in conversion.target_patterns)
