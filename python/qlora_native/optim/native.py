"""What the optimizers share: checks, the step as one native call, the state's way in and out.

8-bit state has one scale for 256 values (Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", 2022); small tensors keep 32 bits. A parameter moves by its moments as they are
before they are encoded, to the nearest code of their dynamic map, by their block's largest
magnitude.

A gradient that is not finite spoils its own value under 32-bit state, as in torch; 8-bit state
leaves that value and its moments as they were, for in a block's scale it would spoil 255 others
too.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from qlora_native.optim.bitsandbytes_state import from_bitsandbytes

BLOCKSIZE = 256  # values that share a scale in 8-bit state

# What a parameter's state has, but for the counters: key -> (shape, dtype).
Layout = dict[str, tuple[Sequence[int], torch.dtype]]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuse(**switches: bool) -> None:
    for name, value in switches.items():
        if value:
            raise ValueError(f"{name} must be False, which is all there is here, got {value}")


def check_not_negative(group: dict[str, Any], *names: str) -> None:
    for name in names:
        if not 0.0 <= float(group[name]) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {group[name]}")


def check_betas(group: dict[str, Any]) -> None:
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def _check_shared_settings(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one value, got shape {lr.shape}")
    check_not_negative(group, "lr", "weight_decay")
    if group.get("min_8bit_size", 0) < 0:
        raise ValueError(f"min_8bit_size must not be negative, got {group['min_8bit_size']}")


def _check_param(param: Tensor, name: str) -> None:
    if param.dtype not in _DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must have dtype {wanted}, got {param.dtype}")
    if param.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got layout {param.layout}")
    if not param.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {tuple(param.stride())} for shape "
            f"{tuple(param.shape)}: make it a parameter from tensor.contiguous()"
        )


@dataclass(frozen=True, slots=True)
class Update:
    """One tensor's share of a step: a parameter with its state, or a piece of both."""

    param: Tensor
    grad: Tensor
    group: dict[str, Any]  # its settings
    state: dict[str, Any]
    progress: int  # what tensors must share to be stepped in one call


class NativeOptimizer(Optimizer):
    """An optimizer whose step is an op; a rule names its state, its ops and their arguments.

    State is 8-bit in groups that have min_8bit_size, for parameters of at least that many values.
    """

    moments: ClassVar[tuple[str, ...]]  # keys of the state, in the ops' order
    counters: ClassVar[tuple[str, ...]] = ()  # keys of the state that are integers
    step_op: ClassVar[Callable[..., None]]
    step_8bit_op: ClassVar[Callable[..., None]]

    # GradScaler.step then sets self.grad_scale and self.found_inf and leaves unscaling to us.
    _step_supports_amp_scaling: ClassVar[bool] = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_settings(defaults)
        super().__init__(params, defaults)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        """Raise ValueError where a setting of this rule is out of its range."""
        raise NotImplementedError

    @staticmethod
    def _progress(state: dict[str, Any], is_new: bool) -> int:
        """What tensors must share to be stepped in one call."""
        raise NotImplementedError

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        """The op's hyperparameters, but for lr, weight_decay, maximize and grad_scale."""
        raise NotImplementedError

    def _check_settings(self, group: dict[str, Any]) -> None:
        _check_shared_settings(group)
        self._check_rule(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # another optimizer's state_dict may lack some
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _has_8bit_state(self, param: Tensor, group: dict[str, Any]) -> bool:
        if "min_8bit_size" not in self.defaults:
            return False
        return bool(param.numel() >= group["min_8bit_size"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that join later, with settings of their own where given."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_settings(group)
            for i, param in enumerate(group["params"]):
                _check_param(param, f"params[{i}]")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Nothing changes, and no step is counted, where GradScaler found a gradient that is not
        finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item() != 0:
            return loss
        updates = self._updates()
        self._apply(updates, getattr(self, "grad_scale", None))
        for update in updates:
            update.state.update(dict.fromkeys(self.counters, update.progress))
            self.state[update.param] = update.state
        return loss

    def _stepped_groups(self) -> Iterable[dict[str, Any]]:
        """The groups of this step: settings, and "params" that share them."""
        return self.param_groups

    def _updates(self) -> list[Update]:
        stepped: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        for group in self._stepped_groups():
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise ValueError(
                        f"{type(self).__name__} needs dense gradients, got one with layout "
                        f"{param.grad.layout} for a parameter of shape {tuple(param.shape)}"
                    )
                stepped.append((param, param.grad, group))
        new = self._new_states(
            {
                param: self._state_layout(param, group)
                for param, _, group in stepped
                if not self.state.get(param)
            }
        )
        updates = []
        for param, grad, group in stepped:
            state = new.get(param) or self.state[param]
            progress = self._progress(state, param in new)
            updates.append(Update(param, grad, group, state, progress))
        return updates

    def _apply(self, updates: Iterable[Update], grad_scale: Tensor | None) -> None:
        # Tensors that share settings, progress and a kind of state go in one call.
        batches: dict[tuple[int, int, bool, torch.device], list[Update]] = defaultdict(list)
        absmax = self._absmax()
        for update in updates:
            is_8bit = absmax[0] in update.state
            key = id(update.group), update.progress, is_8bit, update.param.device
            batches[key].append(update)

        cls = type(self)
        for (_, progress, is_8bit, _), batch in batches.items():
            group = batch[0].group
            keys = (*self.moments, *absmax) if is_8bit else self.moments
            op = cls.step_8bit_op if is_8bit else cls.step_op
            op(
                [update.param for update in batch],
                [update.grad for update in batch],
                *([update.state[key] for update in batch] for key in keys),
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                maximize=group["maximize"],
                grad_scale=grad_scale,
                **self._arguments(group, progress),
            )

    def _absmax(self) -> tuple[str, ...]:
        return tuple(f"{moment}_absmax" for moment in self.moments)

    def _constants(self, param: Tensor, layout: Layout) -> dict[str, Any]:
        """What a new state has besides the tensors that a step writes: its counters, at 0."""
        return dict.fromkeys(self.counters, 0)

    def _new_states(self, layouts: Mapping[Tensor, Layout]) -> dict[Tensor, dict[str, Any]]:
        """What the state of these parameters begins as."""
        # Under an absmax of 0 every code stands for 0, so that 8-bit state starts from zeros too.
        return {
            param: self._constants(param, layout)
            | {
                key: torch.zeros(shape, dtype=dtype, device=param.device)
                for key, (shape, dtype) in layout.items()
            }
            for param, layout in layouts.items()
        }

    def _state_layout(self, param: Tensor, group: dict[str, Any]) -> Layout:
        if not self._has_8bit_state(param, group):
            return dict.fromkeys(self.moments, (param.shape, torch.float32))
        n_blocks = -(-param.numel() // BLOCKSIZE)
        return {
            **dict.fromkeys(self.moments, (param.shape, torch.uint8)),
            **dict.fromkeys(self._absmax(), ((n_blocks,), torch.float32)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, torch.optim's of the same name into the 32-bit one, or
        that of bitsandbytes' optimizer of this rule and kind of state, paged or not.

        Training goes on to the bit as it would have without the detour. Tensors are copied.

        Raises:
            ValueError: the groups differ, or a state's kind, dtype or shape is not what the
                parameter has here. Nothing is changed then.
        """
        # torch casts what it loads to the parameter's dtype, which would spoil codes and fp32
        # state: the values saved are copied before its work, which gets none of them, and put in
        # place right after. Hooks of the user run around that as usual.
        loaded: dict[Tensor, dict[str, Any]] = {}

        def read(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._copied_states(self._read_state(state_dict)))
            return {**state_dict, "state": {}}

        def put(_: Optimizer) -> None:
            self.state.clear()
            self.state.update(loaded)

        hooks = (
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _read_state(
        self, state_dict: dict[str, Any]
    ) -> dict[Tensor, tuple[Layout, dict[str, Any]]]:
        groups = state_dict["param_groups"]
        for group, saved in zip(self.param_groups, groups, strict=False):
            self._check_settings({**group, **saved})
        # Where the groups' sizes differ, torch says so next.
        ids: Iterable[Any] = itertools.chain.from_iterable(g["params"] for g in groups)
        own = [
            (param, {**group, **saved})
            for group, saved in zip(self.param_groups, groups, strict=False)
            for param in group["params"]
        ]
        result = {}
        for i, (param, settings) in zip(ids, own, strict=False):
            if any(value is not None for value in state_dict["state"].get(i, {}).values()):
                result[param] = self._read_param_state(
                    param, settings, state_dict["state"][i], f"state[{i!r}]"
                )
        return result

    def _read_param_state(
        self, param: Tensor, group: dict[str, Any], saved: dict[str, Any], name: str
    ) -> tuple[Layout, dict[str, Any]]:
        """The layout and the values of one parameter's state, checked, as they were saved."""
        layout = self._state_layout(param, group)
        saved = from_bitsandbytes(saved, self.moments, self._absmax(), self.counters)
        keys = [*self.counters, *layout]
        if set(keys) != set(saved):
            raise ValueError(
                f"{type(self).__name__}: {name} must have {', '.join(keys)}, got {', '.join(saved)}"
            )
        result: dict[str, Any] = {key: int(saved[key]) for key in self.counters}
        for key, (shape, dtype) in layout.items():
            value: Tensor = saved[key]
            if value.shape != torch.Size(shape) or value.is_floating_point() != (
                dtype is torch.float32
            ):
                raise ValueError(
                    f"{type(self).__name__}: {name}[{key!r}] must be {dtype} of shape "
                    f"{list(shape)}, got {value.dtype} of shape {list(value.shape)}"
                )
            result[key] = value
        return layout, result

    def _copied_states(
        self, states: Mapping[Tensor, tuple[Layout, dict[str, Any]]]
    ) -> dict[Tensor, dict[str, Any]]:
        """Copies of these values, where and as the state of their parameters is kept."""
        copies = self._new_states({param: layout for param, (layout, _) in states.items()})
        for param, (layout, values) in states.items():
            copies[param].update({key: values[key] for key in self.counters})
            for key in layout:
                copies[param][key].copy_(values[key])
        return copies
