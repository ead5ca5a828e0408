"""The experts of a mixture, which are stacked parameters and no linears, in 4 bits.

transformers 5 holds a layer's experts in one module with parameters [experts, out, in] (or, where
its `is_transposed` is set, [experts, in, out]) and one way to run them all (its
`use_experts_implementation`). `Experts4bit` takes such a module's place: each stack becomes a
`StackedLinear4bit`, quantized as one tensor, and every expert reads its part of it in place.

In a state dict a stack stands under the parameter's own name, with bitsandbytes' keys behind it, as
bitsandbytes' parametrized parameters do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import autograd
from qlora_native.linear import Linear4bit
from qlora_native.quant_state import QuantState

# What transformers' decorator tells of an experts module, and what its stacks may be called.
_TRAITS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
STACKS = ("gate_up_proj", "up_proj", "down_proj")


class StackedLinear4bit(Linear4bit):
    """y[rows of g] = x[rows of g] W[g]^T: a stack [n_groups, out_features, in_features] in 4 bits.

    Made of quantized parts by `from_tensors`, of a float stack by `from_stack`. It holds no bias
    and takes no adapter.
    """

    n_groups: int

    @classmethod
    def from_stack(
        cls,
        weight: Tensor,
        *,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        scale_rounding: str = "nearest",
        name: str = "weight",
    ) -> StackedLinear4bit:
        """The quantized form of a float stack [n_groups, out_features, in_features].

        Raises ValueError where a matrix would not begin with a block. `name` is for errors.
        """
        if (why := why_not_stacked(weight.shape, blocksize)) is not None:
            raise ValueError(f"{name}: {why}")
        layer = cls.from_tensors(
            *cls._quantize(weight, format, blocksize, double_quant, scale_rounding, name)
        )
        layer.scale_rounding = scale_rounding
        return layer

    @classmethod
    def from_tensors(
        cls, packed: Tensor, state: QuantState, bias: Tensor | None = None
    ) -> StackedLinear4bit:
        """A stack that holds these very tensors; nothing is copied or quantized."""
        if len(state.shape) != 3:
            raise ValueError(f"state must be of a stack [G, N, K], got shape {list(state.shape)}")
        if bias is not None:
            raise ValueError("bias must be None: a stack holds none")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init_parts(state.check_packed(packed), state)
        return layer

    def _init_parts(self, packed: Tensor, state: QuantState) -> None:
        self.n_groups = state.shape[0]
        super()._init_parts(packed, state)

    @property
    def shape(self) -> torch.Size:
        """Of the stack."""
        return torch.Size((self.n_groups, self.out_features, self.in_features))

    def take(self, packed: Tensor, state: QuantState) -> None:
        """Hold these quantized parts, of this stack's shape, in place of its own."""
        self._set_quantized(state.check_packed(packed), state)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """x [M, in_features], sorted by group -> [M, out_features] (ops.grouped_linear_4bit)."""
        self._require_loaded(x)
        return autograd.grouped_linear_4bit(
            x,
            offsets,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.out_features,
            self.blocksize,
            self.format,
        )

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, {super().extra_repr()}"

    def _saved_name(self, prefix: str) -> str:
        return prefix.removesuffix(".")


class Experts4bit(nn.Module):
    """What takes an experts module's place: the same forward, its stacks in 4 bits.

    It has the other attributes, parameters and submodules of the module it replaces.
    """

    experts_class: Any  # the class of that module
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    act_fn: Any
    post_expert_norm: Any

    @classmethod
    def from_module(cls, experts: nn.Module, *, name: str = "experts", **quant: Any) -> Experts4bit:
        """The quantized form of an experts module (is_experts), whose other parts it shares.

        Args:
            name: what errors call the module.
            quant: format, blocksize, double_quant, scale_rounding, as StackedLinear4bit has them.
        """
        made = {}
        for stack, parameter in stacks(experts):
            weight = as_rows(experts, parameter.detach())
            made[stack] = StackedLinear4bit.from_stack(weight, name=f"{name}.{stack}", **quant)
        return cls.from_stacks(experts, made)

    @classmethod
    def from_stacks(
        cls, experts: nn.Module, stacks: Mapping[str, StackedLinear4bit]
    ) -> Experts4bit:
        """An experts module on these quantized stacks, its parameters' names their names."""
        layer = cls.__new__(cls)
        layer._take(experts)
        layer.experts_class = type(experts)
        for name, stack in stacks.items():
            stack.fan_in_fan_out = bool(experts.is_transposed)
            stack.training = experts.training
            del layer._parameters[name]
            layer.add_module(name, stack)
        return layer

    def to_module(self, dtype: torch.dtype) -> nn.Module:
        """The experts module that this one amounts to, its stacks in dtype, frozen."""
        experts: nn.Module = self.experts_class.__new__(self.experts_class)
        Experts4bit._take(experts, self)  # type: ignore[arg-type]
        for name, stack in self.stacks():
            weight = nn.Parameter(stored_stack(stack, dtype), requires_grad=False)
            del experts._modules[name]
            experts.register_parameter(name, weight)
        return experts

    def stacks(self) -> Iterator[tuple[str, StackedLinear4bit]]:
        """Name and module of each stack."""
        for name, module in self.named_children():
            if isinstance(module, StackedLinear4bit):
                yield name, module

    def _take(self, other: nn.Module) -> None:
        """Become a module with the attributes, parameters and submodules of `other`."""
        nn.Module.__init__(self)
        own = vars(self)
        own.update({name: value for name, value in vars(other).items() if name not in own})
        self.training = other.training
        self._parameters.update(other._parameters)
        self._modules.update(other._modules)
        own.pop("experts_class", None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of each token's experts by its weights, as transformers' grouped experts give it.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], each token's experts.
            top_k_weights: [tokens, k].
        """
        tokens, k = top_k_index.shape
        expert_of = top_k_index.reshape(-1)
        # Every token once for each of its experts, sorted by expert.
        order = expert_of.argsort(stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int32, device=order.device)
        counts = counts.scatter_add(0, expert_of, torch.ones_like(expert_of, dtype=torch.int32))
        offsets = counts.cumsum(0, dtype=torch.int32)
        sorted_experts = expert_of[order]

        first = "gate_up_proj" if self.has_gate else "up_proj"
        x = self._project(first, hidden_states[order // k], offsets, sorted_experts)
        x = self.experts_class._apply_gate(self, x) if self.has_gate else self.act_fn(x)
        x = self._project("down_proj", x, offsets, sorted_experts)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)

        # Back in the tokens' order; summed without atomics, so that the sum's order is fixed.
        x = x[order.argsort()].view(tokens, k, x.shape[-1]).sum(1)
        return x.to(hidden_states.dtype)

    def _project(self, name: str, x: Tensor, offsets: Tensor, expert_of: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(name)(x, offsets)
        if not self.has_bias:
            return y
        bias: Tensor = getattr(self, f"{name}_bias")
        return y + bias[expert_of].to(y.dtype)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        # A module is given the keys below its name alone: a stack's own must be put there.
        for name, _ in self.stacks():
            key = f"{prefix}{name}"
            for found in [k for k in state_dict if k == key or k.startswith(f"{key}.")]:
                state_dict[f"{key}.weight{found.removeprefix(key)}"] = state_dict.pop(found)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_experts(module: nn.Module) -> bool:
    """Whether this is an experts module of transformers 5, un-quantized."""
    has_traits = all(hasattr(module, trait) for trait in _TRAITS)
    return has_traits and not isinstance(module, Experts4bit) and any(stacks(module))


def stacks(experts: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The experts' stacked parameters by name."""
    own = experts._parameters
    return [(name, p) for name in STACKS if (p := own.get(name)) is not None and p.dim() == 3]


def as_rows(experts: nn.Module, weight: Tensor) -> Tensor:
    """A stack as its module stores it, as [experts, out, in]."""
    return weight.mT.contiguous() if experts.is_transposed else weight


def why_not_stacked(shape: torch.Size, blocksize: int) -> str | None:
    """Why a stack of this shape cannot be quantized, or None."""
    size = shape[1] * shape[2]
    if shape[0] > 1 and size % blocksize != 0:
        return (
            f"its matrices have {size} values, no multiple of blocksize={blocksize}, so that not "
            "all of them would begin with a block"
        )
    return None


def stored_stack(stack: StackedLinear4bit, dtype: torch.dtype) -> Tensor:
    """The stack's values as its module stores them, [experts, in, out] where is_transposed."""
    weight = stack.dequantize(dtype)
    return weight.mT.contiguous() if stack.fan_in_fan_out else weight


def stored_shape(stack: StackedLinear4bit) -> torch.Size:
    """Shape of stored_stack(stack)."""
    groups, rows, cols = stack.shape
    return torch.Size((groups, cols, rows)) if stack.fan_in_fan_out else stack.shape
