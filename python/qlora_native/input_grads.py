"""So that reentrant gradient checkpointing trains adapters on a frozen model.

Reentrant checkpointing lets a block's output need a gradient only where its input does. With all
weights frozen the embeddings' output needs none, the blocks' adapters get none, and backward ends
in "element 0 of tensors does not require grad". The remedy, transformers' own
(enable_input_require_grads), is a hook that makes the embeddings' output require a gradient. It
costs the first block's input gradient, so it acts only while the model checkpoints, where the model
tells that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InputsRequireGrad:
    """The hook: a forward hook of an embedding, or a forward pre-hook of a model that has none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _wanted(self) -> bool:
        # A compiled graph has no reentrant checkpointing, and no requires_grad_ inside it.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
            if hasattr(type(self.model), name):
                return bool(getattr(self.model, name))
        return True

    def after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not output.requires_grad and self._wanted():
            output.requires_grad_(True)

    def before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._wanted():
            return None
        return tuple(map(_requiring_grad, args)), {k: _requiring_grad(v) for k, v in kwargs.items()}


def _requiring_grad(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_(True)
    return value


def let_inputs_require_grad(model: nn.Module) -> None:
    """Put the hook on the model's input embeddings, or on the model where it has none; once."""
    leave_inputs_alone(model)
    hook = InputsRequireGrad(model)
    embeddings = _input_embeddings(model)
    for embedding in embeddings:
        embedding.register_forward_hook(hook.after_embedding)
    if not embeddings:
        model.register_forward_pre_hook(hook.before_model, with_kwargs=True)


def leave_inputs_alone(model: nn.Module) -> None:
    """Take the hook off again."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), InputsRequireGrad):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    get = getattr(model, "get_input_embeddings", None)
    if callable(get):
        try:
            found = get()
        except NotImplementedError:  # transformers' base method, where a model has none of its own
            found = None
        if isinstance(found, nn.Module):
            return [found]
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]
