"""What the optimizers share: bitsandbytes' arguments, names of state and files, over our steps.

The step itself, one native call for many tensors, is qlora_native.optim's; here are the names:
moments state1 and state2, their scales absmax1 and absmax2, their maps qmap1 and qmap2. 8-bit
moments are encoded to the exact nearest code on every device, which bitsandbytes does on CUDA but
not quite on a CPU (docs/numerics.md).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native.bitsandbytes._missing import refuse
from qlora_native.bitsandbytes.maps import dynamic_map
from qlora_native.bitsandbytes.optim.manager import GlobalOptimManager
from qlora_native.optim.native import Layout
from qlora_native.optim.paged_state import MIN_PAGED_SIZE, PagedState


class Optimizer8bit(PagedState):
    """The base of all of them: state of 32 bits, or of 8 in tensors of min_8bit_size values.

    Args:
        params, defaults: torch.optim.Optimizer's.
        optim_bits: 32 or 8.
        args: an object with optim_bits, min_8bit_size, max_unorm and skip_zeros; the last two
            must be 0 and False.
        is_paged: state of tensors with 100,000 values or more gives way (qlora_native.optim's
            PagedState), on a CPU to a file, where bitsandbytes keeps it in memory.
    """

    counters = ("step",)

    # 8-bit state has other shapes than its parameter: FSDP, which gathers tensors by their
    # parameter's shape, leaves what is in a dictionary alone.
    _FSDP_WRAPPED_QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"
    _WRAPPED = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")

    # Whether the map of each moment has negative values, in moments' order.
    signs: ClassVar[tuple[bool, ...]]

    # What a class's name promises: its bits, and that its state is paged.
    fixed_bits: ClassVar[int | None] = None
    always_paged: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        bits = optim_bits
        if self.fixed_bits is not None:
            if optim_bits != 32:  # the default of a signature that some of them share
                raise ValueError(
                    f"optim_bits must be left alone, as {type(self).__name__} says it, "
                    f"got {optim_bits}"
                )
            bits = self.fixed_bits
        self.args = args or SimpleNamespace(
            optim_bits=bits, min_8bit_size=min_8bit_size, max_unorm=0.0, skip_zeros=False
        )
        self.mng = GlobalOptimManager.get_instance()
        self.is_paged = is_paged or self.always_paged
        self.initialized = False
        _check_args(vars(self.args))
        least = MIN_PAGED_SIZE if self.is_paged else sys.maxsize
        super().__init__(params, defaults, min_paged_size=least)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; what is not contiguous is made so, as bitsandbytes does in its step."""
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):
            param_group["params"] = params = list(params)
            for param in params:
                _make_contiguous(param[1] if isinstance(param, tuple) else param)
        super().add_param_group(param_group)

    # ---- the step ----

    def _stepped_groups(self) -> Iterator[dict[str, Any]]:
        if not self.initialized:
            self.mng.read_modules(self.param_groups)
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            # Parameters with the same settings of their own are stepped together.
            batches: dict[str, tuple[dict[str, Any], list[Tensor]]] = {}
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    _make_contiguous(param)
                    own = self.mng.settings_of(param, (group_index, i))
                    batches.setdefault(repr(own), (own, []))[1].append(param)
            for own, params in batches.values():
                settings = {**group, **vars(self.args), **own, "maximize": False}
                if own:
                    _check_args(settings)
                    self._check_settings(settings)
                yield {**settings, "params": params}

    @staticmethod
    def _progress(state: dict[str, Any], is_new: bool) -> int:
        return int(state["step"]) + 1

    # ---- state and its names ----

    def _has_8bit_state(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["optim_bits"] == 8 and param.numel() >= group["min_8bit_size"])

    def _absmax(self) -> tuple[str, ...]:
        return tuple(f"absmax{i + 1}" for i in range(len(self.moments)))

    def _constants(self, param: Tensor, layout: Layout) -> dict[str, Any]:
        maps = {}
        if "absmax1" in layout:
            maps = {f"qmap{i + 1}": dynamic_map(s, param.device) for i, s in enumerate(self.signs)}
        return super()._constants(param, layout) | maps

    def state_dict(self) -> dict[str, Any]:
        """torch's dictionary, with each parameter's tensors in a dictionary of their own."""
        whole = super().state_dict()
        whole["state"] = {key: self._wrapped(state) for key, state in whole["state"].items()}
        return whole

    def _wrapped(self, state: dict[str, Any]) -> dict[str, Any]:
        inner = {key: value for key, value in state.items() if key in self._WRAPPED}
        outer = {key: value for key, value in state.items() if key not in inner}
        return {**outer, self._FSDP_WRAPPED_QUANT_STATE_KEY: inner} if inner else outer

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state_dict of this class, or of bitsandbytes' one of the same name.

        Training goes on to the bit as it would have without the detour. Tensors are copied, to
        their parameters' devices.

        Raises:
            ValueError: the groups differ, or a state's kind, dtype or shape is not what the
                parameter has here. Nothing is changed then.
        """
        if not move_to_device:
            raise ValueError("move_to_device must be True: a step needs its state on its device")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "args": self.args, "is_paged": self.is_paged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own: dict[str, Any] = {key: state[key] for key in ("args", "is_paged") if key in state}
        if own:  # load_state_dict gives none
            self.__dict__.update(own, mng=GlobalOptimManager.get_instance(), initialized=False)
        super().__setstate__({key: value for key, value in state.items() if key not in own})

    def _read_param_state(
        self, param: Tensor, group: dict[str, Any], saved: dict[str, Any], name: str
    ) -> tuple[Layout, dict[str, Any]]:
        # The state's kind is the saved one's: what the manager overrides may be told later.
        keys = {*saved, *saved.get(self._FSDP_WRAPPED_QUANT_STATE_KEY, {})}
        kind = {"optim_bits": 8 if "absmax1" in keys else 32, "min_8bit_size": 0}
        return super()._read_param_state(param, {**group, **kind}, saved, name)


def _check_args(args: dict[str, Any]) -> None:
    if args["optim_bits"] not in (8, 32):
        raise NotImplementedError(f"optim_bits must be 8 or 32, got {args['optim_bits']}")
    if args["max_unorm"] > 0.0:
        refuse("max_unorm", "clip gradients by torch.nn.utils.clip_grad_norm_")
    if args["skip_zeros"]:
        refuse("skip_zeros", "pass skip_zeros=False")


def _make_contiguous(param: Tensor) -> None:
    if param.layout is torch.strided and not param.is_contiguous():
        param.data = param.data.contiguous()
    if param.grad is not None and not param.grad.is_contiguous():
        param.grad = param.grad.contiguous()
