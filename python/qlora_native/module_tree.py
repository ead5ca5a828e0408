"""Finding, comparing and replacing the modules of a model by their dotted names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def places(model: nn.Module) -> dict[str, list[str]]:
    """First name of each module -> all names it is reached by."""
    by_module: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_module.setdefault(id(module), []).append(name)
    return {names[0]: names for names in by_module.values() if names[0]}


def sharing(model: nn.Module) -> dict[str, list[str]]:
    """Name of each module -> names of the others whose weight is the same tensor."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        users.setdefault(id(module) if weight is None else id(weight), []).append(name)
    return {name: [n for n in group if n != name] for group in users.values() for name in group}


def replace(model: nn.Module, names: Sequence[str], old: nn.Module, new: nn.Module) -> None:
    """Put `new`, with the hooks of `old`, wherever `old` is reached by one of names."""
    new.train(old.training)
    new._forward_hooks = old._forward_hooks
    new._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
    new._forward_pre_hooks = old._forward_pre_hooks
    new._forward_pre_hooks_with_kwargs = old._forward_pre_hooks_with_kwargs
    new._backward_hooks = old._backward_hooks
    new._backward_pre_hooks = old._backward_pre_hooks
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def has_parts(name: str, entry: str) -> bool:
    """Whether the dotted name has the entry's parts in a row."""
    return f".{entry}." in f".{name}."


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear of transformers, with the weight stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself, or an nn.Linear on a view of a Conv1D's transposed weight."""
    if isinstance(module, nn.Linear):
        return module
    weight = module.weight
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=False)
    assert module.bias is None or isinstance(module.bias, nn.Parameter)
    linear.bias = module.bias
    return linear
