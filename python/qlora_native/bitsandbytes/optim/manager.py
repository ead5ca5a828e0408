"""`GlobalOptimManager`: settings of single parameters that win over their group's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class GlobalOptimManager:
    """The one table, by parameter, of settings that optimizers of this package then use.

    Any of lr, betas, eps, weight_decay, optim_bits and min_8bit_size may be overridden. A
    parameter's kind of state (optim_bits) is settled by its first step.
    """

    _instance: GlobalOptimManager | None = None

    pid2config: dict[int, dict[str, Any]]
    index2config: dict[tuple[int, int], dict[str, Any]]
    module_weight_config_triple: list[tuple[nn.Module, str, dict[str, Any]]]

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager is one for all: call get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget everything."""
        self.pid2config = {}
        self.index2config = {}
        self.module_weight_config_triple = []
        self.uses_config_override = False

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Settings given by override_config, by the place of the parameters in their groups."""
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                if id(param) in self.pid2config:
                    self.index2config[i, j] = self.pid2config[id(param)]

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Let `parameters` have this setting, or these.

        Raises:
            ValueError: both a key and a dictionary are given, or neither.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("either key and value or key_value_dict must be given")
        settings = {key: value} if key is not None else dict(key_value_dict or {})
        self.uses_config_override = True
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            self.pid2config.setdefault(id(param), {}).update(settings)

    def register_module_override(
        self, module: nn.Module, param_name: str, config: dict[str, Any]
    ) -> None:
        """Let the parameter that the module has by that name at the first step have `config`."""
        self.module_weight_config_triple.append((module, param_name, config))

    def read_modules(self, groups: list[dict[str, Any]]) -> None:
        """Settle register_module_override's parameters that are in these groups."""
        ids = {id(param) for group in groups for param in group["params"]}
        for module, name, config in self.module_weight_config_triple:
            param = getattr(module, name)
            if id(param) in ids:
                self.pid2config.setdefault(id(param), {}).update(config)

    def settings_of(self, param: Tensor, place: tuple[int, int]) -> dict[str, Any]:
        """What is overridden for a parameter, by its place and by itself."""
        return {**self.index2config.get(place, {}), **self.pid2config.get(id(param), {})}
