"""AdamW and AdamW8bit: torch optimizers whose whole step is one native call.

Both follow torch.optim.AdamW's formula and order of operations (decoupled weight decay, bias
correction) in fp32 arithmetic, whatever dtype the parameters have. AdamW keeps two fp32 moments,
8 bytes a value; AdamW8bit keeps them in 8 bits with one scale for 256 values (Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization", 2022), 2.03 bytes a value, and small tensors in 32.

A gradient that is not finite spoils its own value under AdamW, as in torch; AdamW8bit leaves that
value and its moments as they were, for in a block's scale it would spoil 255 others too.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from qlora_native import ops

BLOCKSIZE = 256  # values that share a scale in 8-bit state

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ABSMAX = ("exp_avg_absmax", "exp_avg_sq_absmax")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _refuse(**switches: bool) -> None:
    for name, value in switches.items():
        if value:
            raise ValueError(f"{name} must be False, which is all there is here, got {value}")


def _check_settings(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one value, got shape {lr.shape}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {group[name]}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
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


class _NativeAdamW(Optimizer):
    """What both optimizers share: the checks, the step and the state's way in and out."""

    # GradScaler.step then sets self.grad_scale and self.found_inf and leaves unscaling to us.
    _step_supports_amp_scaling: ClassVar[bool] = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        _check_settings(defaults)
        super().__init__(params, defaults)

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
            _check_settings(group)
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
        for group in self.param_groups:
            self._step_group(group, getattr(self, "grad_scale", None))
        return loss

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        # Tensors that share a step count and a kind of state go in one call.
        batches: dict[tuple[int, bool, torch.device], list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout is not torch.strided:
                raise ValueError(
                    f"{type(self).__name__} needs dense gradients, got one with layout "
                    f"{param.grad.layout} for a parameter of shape {tuple(param.shape)}"
                )
            state = self.state[param]
            if not state:
                state.update(self._new_state(param, group))
            batches[state["step"] + 1, "exp_avg_absmax" in state, param.device].append(param)

        beta1, beta2 = group["betas"]
        for (step, is_8bit, _), params in batches.items():
            states = [self.state[param] for param in params]
            keys = (*_MOMENTS, *_ABSMAX) if is_8bit else _MOMENTS
            adamw = ops.adamw_8bit_step if is_8bit else ops.adamw_step
            adamw(
                params,
                [cast(Tensor, param.grad) for param in params],
                *([state[key] for state in states] for key in keys),
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                step=step,
                maximize=group["maximize"],
                grad_scale=grad_scale,
            )
            for state in states:
                state["step"] = step

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        # Under an absmax of 0 every code stands for 0, so that 8-bit state starts from zeros too.
        layout = self._state_layout(param, group)
        zeros = {
            key: torch.zeros(shape, dtype=dtype, device=param.device)
            for key, (shape, dtype) in layout.items()
        }
        return {"step": 0, **zeros}

    def _state_layout(
        self, param: Tensor, group: dict[str, Any]
    ) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        if not self._has_8bit_state(param, group):
            return dict.fromkeys(_MOMENTS, (param.shape, torch.float32))
        n_blocks = -(-param.numel() // BLOCKSIZE)
        return {
            **dict.fromkeys(_MOMENTS, (param.shape, torch.uint8)),
            **dict.fromkeys(_ABSMAX, ((n_blocks,), torch.float32)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or one of torch.optim.AdamW into AdamW.

        Training goes on to the bit as it would have without the detour. Tensors are copied.

        Raises:
            ValueError: the groups differ, or a state's kind, dtype or shape is not what the
                parameter has here. Nothing is changed then.
        """
        # torch casts what it loads to the parameter's dtype, which would spoil codes and fp32
        # state: the values saved are checked before its work and put in place right after. Hooks of
        # the user run around that as usual.
        loaded: dict[Tensor, dict[str, Any]] = {}

        def read(_: Optimizer, state_dict: dict[str, Any]) -> None:
            loaded.update(self._read_state(state_dict))

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

    def _read_state(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        groups = state_dict["param_groups"]
        for group in groups:
            _refuse(amsgrad=group.get("amsgrad", False))
        # Where the groups' sizes differ, torch says so next.
        ids: Iterable[Any] = itertools.chain.from_iterable(g["params"] for g in groups)
        own = [
            (param, {**group, **saved})
            for group, saved in zip(self.param_groups, groups, strict=False)
            for param in group["params"]
        ]
        result: dict[Tensor, dict[str, Any]] = {}
        for i, (param, settings) in zip(ids, own, strict=False):
            if i in state_dict["state"]:
                result[param] = self._read_param_state(
                    param, settings, state_dict["state"][i], f"state[{i!r}]"
                )
        return result

    def _read_param_state(
        self, param: Tensor, group: dict[str, Any], saved: dict[str, Any], name: str
    ) -> dict[str, Any]:
        layout = self._state_layout(param, group)
        if {"step", *layout} != set(saved):
            raise ValueError(
                f"{type(self).__name__}: {name} must have {', '.join(['step', *layout])}, "
                f"got {', '.join(saved)}"
            )
        result: dict[str, Any] = {"step": int(saved["step"])}
        for key, (shape, dtype) in layout.items():
            value: Tensor = saved[key]
            if value.shape != torch.Size(shape) or value.is_floating_point() != (
                dtype is torch.float32
            ):
                raise ValueError(
                    f"{type(self).__name__}: {name}[{key!r}] must be {dtype} of shape "
                    f"{list(shape)}, got {value.dtype} of shape {list(value.shape)}"
                )
            result[key] = value.to(
                device=param.device,
                dtype=dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
        return result


class AdamW(_NativeAdamW):
    """AdamW with 32-bit state (Loshchilov & Hutter, 2019).

    Takes the arguments of torch.optim.AdamW and loads its state_dict, as torch loads ours.

    Args:
        params: dense, contiguous float32, float16 or bfloat16 parameters, or dicts of groups.
        lr, betas, eps, weight_decay, maximize: as in torch, for each group too.
        foreach, fused: taken and without effect; a step is always one call for all tensors.
        amsgrad, capturable, differentiable: refused where True.

    GradScaler hands its scale to the step, which divides by it; gradients are left scaled.

    Raises:
        ValueError: a setting is out of its range, or a parameter is sparse or not contiguous.
        TypeError: a parameter has another dtype.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _refuse(amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )


class AdamW8bit(_NativeAdamW):
    """AdamW with 8-bit blockwise state; tensors of fewer than `min_8bit_size` values keep 32 bits.

    The arguments of AdamW, and min_8bit_size, which bitsandbytes names and sets likewise. Each
    moment is encoded to the nearest code of its dynamic map, by its block's largest magnitude;
    a parameter moves by its moments as they are before that.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        min_8bit_size: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _refuse(amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "min_8bit_size": min_8bit_size,
            },
        )
