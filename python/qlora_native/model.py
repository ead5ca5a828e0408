"""A model's linears into 4-bit ones, adapters onto them and off again, module by module, in place.

Works on any nn.Module; transformers' models tell more (output embeddings, what to keep in fp32), by
their own methods, and transformers is not imported for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qlora_native.experts import (
    Experts4bit,
    StackedLinear4bit,
    is_experts,
    stacks,
    why_not_stacked,
)
from qlora_native.footprint import Footprint, footprint
from qlora_native.input_grads import leave_inputs_alone, let_inputs_require_grad
from qlora_native.linear import Linear4bit
from qlora_native.lora import QLoRALinear
from qlora_native.module_tree import (
    as_linear,
    has_parts,
    is_conv1d,
    is_linear,
    places,
    replace,
    sharing,
)
from qlora_native.quant_state import WEIGHT_DTYPES
from qlora_native.requantize import SeededGenerators
from qlora_native.targets import near, output_embedding_names, pattern_value, select

__all__ = [
    "Footprint",
    "QuantizeReport",
    "add_lora",
    "disable_adapters",
    "footprint",
    "lora_layers",
    "merge",
    "put_lora",
    "quantize",
    "quantized_experts",
    "quantized_layers",
    "remove_lora",
    "to_linear",
    "trainable_parameters",
    "unmerge",
]

_DEFAULT_SKIP = ("lm_head",)


# ---- quantizing ----------------------------------------------------------------------------------


@dataclass
class QuantizeReport:
    """What `quantize` did: names of the quantized linears and stacks of experts; name -> why not,
    of those it left."""

    quantized: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.quantized)} weights quantized"]
        lines += [f"  left: {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = _DEFAULT_SKIP,
    *,
    scale_rounding: str = "nearest",
) -> QuantizeReport:
    """Turn the model's nn.Linear (and GPT-2's Conv1D) into `Linear4bit`, in place, one at a time.

    The experts of a mixture, stacked parameters in transformers 5, become `Experts4bit`.

    Each float weight is freed before the next is quantized, so the peak is the model plus one
    quantized weight. A linear that is tied to an embedding is left, as the embedding is. On the
    meta device nothing is computed and the result waits for a checkpoint.

    Args:
        skip: names to leave: a whole dotted name, or consecutive parts of it ("lm_head",
            "layers.0", "self_attn.q_proj").
        format, blocksize, double_quant, scale_rounding: as functional.quantize_4bit has them.

    Returns:
        what was quantized, and what was left and why.

    Raises:
        ValueError: the model is itself a linear, which cannot be replaced in place; an entry of
            skip (but the default one) matches nothing; a weight holds Inf or NaN.
    """
    if is_linear(model):
        raise ValueError(
            "the model is itself a linear: use nn.Linear4bit.from_linear, or pass a model around it"
        )
    names = [name for name, _ in model.named_modules()]
    names += [
        f"{name}.{stack}"
        for name, module in model.named_modules()
        if is_experts(module)
        for stack, _ in stacks(module)
    ]
    for entry in skip:
        if entry not in _DEFAULT_SKIP and not any(has_parts(name, entry) for name in names):
            close = near(entry, names)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"skip: {entry!r} matches no module{hint}")
    skipped = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    if tuple(skip) == _DEFAULT_SKIP:
        skipped += output_embedding_names(model)

    how: dict[str, Any] = {
        "format": format,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "scale_rounding": scale_rounding,
    }
    report = QuantizeReport()
    names_of = places(model)
    sharers = sharing(model)
    report.left = {
        name: why
        for name in names_of
        if (why := _why_not(model, name, skipped, sharers[name], blocksize)) is not None
    }
    for name in names_of:
        module = model.get_submodule(name)
        if name in report.left:
            continue
        if is_experts(module):
            experts = Experts4bit.from_module(module, name=name, **how)
            replace(model, names_of[name], module, experts)
            del module
            report.quantized += [f"{name}.{stack}" for stack, _ in experts.stacks()]
            continue
        if not is_linear(module):
            continue
        linear = as_linear(module)
        twins = (model.get_submodule(other) for other in sharers[name])
        twin = next((other for other in twins if isinstance(other, Linear4bit)), None)
        if twin is not None:
            new = Linear4bit.from_tensors(twin.weight, twin.quant_state, linear.bias)
        else:
            new = Linear4bit.from_linear(linear, name=f"{name}.weight", **how)
        new.fan_in_fan_out = is_conv1d(module)
        new.scale_rounding = scale_rounding
        replace(model, names_of[name], module, new)
        del module, linear  # and with it the float weight, before the next one
        report.quantized.append(name)
    return report


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    """Name and module of every 4-bit linear, adapters on it or not; not the experts' stacks."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and not isinstance(module, StackedLinear4bit):
            yield name, module


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, Experts4bit]]:
    """Name and module of every mixture's experts in 4 bits."""
    for name, module in model.named_modules():
        if isinstance(module, Experts4bit):
            yield name, module


def _why_not(
    model: nn.Module,
    name: str,
    skipped: Sequence[str],
    shared_with: Sequence[str],
    blocksize: int,
) -> str | None:
    """Why the module of this name, if it has a matrix, is not quantized; None if it is."""
    module = model.get_submodule(name)
    if is_experts(module):
        return why_not_experts(module, name, skipped, blocksize)
    why = why_not_itself(module, name, skipped)
    if why is not None or not shared_with or not is_linear(model.get_submodule(name)):
        return why
    for other in shared_with:
        if is_conv1d(model.get_submodule(other)) != is_conv1d(model.get_submodule(name)):
            return f"its weight is that of {other}, transposed"
        if why_not_itself(model.get_submodule(other), other, skipped) is not None:
            return f"its weight is tied to {other}, which is not quantized"
    return None


def why_not_experts(
    experts: nn.Module, name: str, skipped: Sequence[str], blocksize: int
) -> str | None:
    """Why this experts module (is_experts) is not quantized, or None."""
    for stack, parameter in stacks(experts):
        for entry in skipped:
            if has_parts(f"{name}.{stack}", entry):
                return f"in skip, by {entry!r}"
        if parameter.dtype not in WEIGHT_DTYPES:
            return f"its {stack} is {parameter.dtype}, not one of {WEIGHT_DTYPES}"
        shape = parameter.shape
        if (why := why_not_stacked(shape, blocksize)) is not None:
            return f"{stack}: {why}"
    return None


def why_not_itself(module: nn.Module, name: str, skipped: Sequence[str]) -> str | None:
    if isinstance(module, nn.Embedding):
        return "an embedding: looked up, not multiplied"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        own = [n for n, p in module.named_parameters(recurse=False) if p.dim() >= 2]
        if not own or isinstance(module, (Linear4bit, Experts4bit)):
            return None
        return f"{', '.join(own)} of a {type(module).__name__}, which is not an nn.Linear"
    for entry in skipped:
        if has_parts(name, entry):
            return f"in skip, by {entry!r}"
    if has_parts(name, "lora_A") or has_parts(name, "lora_B"):
        return "an adapter's own matrix"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight itself"
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if own_forward or "forward" in vars(module):
        return f"its forward is its own, not nn.Linear's ({type(module).__name__})"
    if module.weight.dtype not in WEIGHT_DTYPES:
        return f"its weight is {module.weight.dtype}, not one of {WEIGHT_DTYPES}"
    return None


# ---- adapters ------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    *,
    use_dora: bool = False,
    exclude: str | Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Put LoRA on the model's 4-bit linears, in place, and freeze everything else.

    Args:
        r, alpha, dropout, use_rslora, use_dora, adapter_dtype: as QLoRALinear has them.
        targets: "all-linear" (all but the output embeddings), a list of names ("q_proj"; a module
            matches if its dotted name ends so), or a regular expression for the whole name.
        exclude: as targets; left out of them.
        rank_pattern, alpha_pattern: regular expression for the end of a name -> its own r or alpha.

    Gradient checkpointing, reentrant or not, needs nothing further (input_grads.py).

    Returns:
        the names of the modules that have an adapter now.

    Raises:
        ValueError: nothing is quantized, targets match nothing (the message names what comes near),
            or there are adapters already.
    """
    candidates = [name for name, _ in quantized_layers(model)]
    if not candidates:
        raise ValueError("the model has no quantized linear: call quantize(model) first")
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already: call remove_lora(model) first")
    chosen = select(
        candidates,
        targets,
        exclude=exclude,
        all_names=[name for name, _ in model.named_modules() if name],
        never=output_embedding_names(model),
    )
    put_lora(
        model,
        {
            name: {
                "r": pattern_value(rank_pattern or {}, name, r),
                "alpha": pattern_value(alpha_pattern or {}, name, alpha),
                "dropout": dropout,
                "use_rslora": use_rslora,
                "use_dora": use_dora,
                "adapter_dtype": adapter_dtype,
            }
            for name in chosen
        },
    )
    return chosen


def put_lora(model: nn.Module, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Put LoRA on the 4-bit linears of these names, each with its options, and freeze all else."""
    model.requires_grad_(False)
    names_of = places(model)
    for name, layer_options in options.items():
        base = model.get_submodule(name)
        assert isinstance(base, Linear4bit)
        replace(model, names_of[name], base, QLoRALinear.from_base(base, **layer_options))
    let_inputs_require_grad(model)


def remove_lora(model: nn.Module) -> None:
    """Take the adapters off again: the 4-bit linears are as they were."""
    names_of = places(model)
    for name, layer in list(lora_layers(model)):
        replace(model, names_of[name], layer, layer.base())
    leave_inputs_alone(model)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, QLoRALinear]]:
    """Name and module of every linear with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, QLoRALinear):
            yield name, module


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get: the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it, the model is its base: adapters, merged or not, have no effect."""
    layers = [layer for _, layer in lora_layers(model) if layer.adapter_enabled]
    for layer in layers:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_enabled = True


def merge(
    model: nn.Module, dtype: torch.dtype | None = None, *, rounding: str = "stochastic"
) -> None:
    """Merge the adapters into the weights, in place.

    Without dtype, each layer puts W + scaling * B A beside its base, quantized again (inference
    without the adapters' products, twice the 4-bit bytes); `unmerge` restores every bit. rounding
    is QLoRALinear.quantized_again's: "stochastic" keeps what was learned, "nearest" little of it.
    With a float dtype, every 4-bit linear becomes an nn.Linear of it, and the experts of a mixture
    what they were, for good.
    """
    if dtype is None:
        generators = SeededGenerators()
        for _, layer in lora_layers(model):
            layer.merge(rounding, generators[layer.weight.device])
        return
    names_of = places(model)
    for name, quantized in list(quantized_layers(model)):
        replace(model, names_of[name], quantized, to_linear(quantized, dtype))
    for name, experts in list(quantized_experts(model)):
        replace(model, names_of[name], experts, experts.to_module(dtype))
    leave_inputs_alone(model)


def unmerge(model: nn.Module) -> None:
    """Undo merge(model): base and adapters as they were, to the bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


@torch.no_grad()
def to_linear(layer: Linear4bit, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear of the weight that this layer, adapter included, amounts to."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    if isinstance(layer, QLoRALinear):
        weight = layer.merged_weight(dtype)
    else:
        weight = layer.dequantize(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    linear.training = layer.training
    return linear
