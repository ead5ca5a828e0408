"""Adapters in PEFT's files: adapter_model.safetensors and adapter_config.json.

PEFT's `PeftModel.from_pretrained` reads what `save_adapter` writes, and `load_adapter` what PEFT's
`save_pretrained` writes. The tensors' names and shapes tell which modules have an adapter and of
which rank, and must agree with the config. What a config asks for beyond LoRA, rsLoRA and DoRA on
linears is refused by name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qlora_native.files import write_file
from qlora_native.linear import Linear4bit
from qlora_native.lora import QLoRALinear
from qlora_native.model import lora_layers, put_lora, quantized_layers, remove_lora
from qlora_native.targets import ALL_LINEAR, matches, near, output_embedding_names, pattern_value

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_PREFIX = "base_model.model."
# Ours -> PEFT's, both after the module's name.
_TENSORS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}

# What PEFT's config may say without changing what we compute: value or values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
# Initializations that leave the base weight as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, …)
# save an adapter that is only right on a base weight they changed.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


# ---- saving -------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model_name: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Path:
    """Write the model's adapters so that PEFT and `load_adapter` read them.

    Each file is written beside its place and renamed into it, so that a reader, or a crash, meets
    an old file or a new one, never half of one.

    Args:
        base_model_name: what PEFT shall load the base from; the model's own name_or_path if None.
        task_type: for PEFT's choice of wrapper; None for models without `generate`.

    Returns:
        the folder.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no adapters: nothing to save")
    tensors = {
        _key(_plain(name), part): tensor.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in _TENSORS
        if (tensor := getattr(layer, part)) is not None
    }
    config = _config_of(model, layers, base_model_name, task_type)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _config_of(
    model: nn.Module,
    layers: Mapping[str, QLoRALinear],
    base_model_name: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    r, rank_pattern = _common({name: layer.r for name, layer in layers.items()})
    alpha, alpha_pattern = _common({name: _whole(layer.alpha) for name, layer in layers.items()})
    if base_model_name is None:
        base_model_name = getattr(model, "name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "bias": "none",
        "init_lora_weights": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _targets_for_peft(model, list(layers)),
        "lora_dropout": _uniform(layers, "dropout"),
        "use_rslora": _uniform(layers, "use_rslora"),
        "use_dora": _uniform(layers, "use_dora"),
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
    }


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by module name."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {_plain(name): value for name, value in values.items() if value != common}


def _uniform(layers: Mapping[str, QLoRALinear], attribute: str) -> Any:
    values = {getattr(layer, attribute) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(
            f"{attribute} must be the same on all layers to be saved, as PEFT's config has one, "
            f"got {sorted(values)}"
        )
    return values.pop()


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _targets_for_peft(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names where those mean just these modules, else the whole names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name, _ in model.named_modules() if matches(name, short)}
    return short if meant == set(names) else sorted(map(_plain, names))


def _plain(name: str) -> str:
    """The name without what torch.compile put into it."""
    return name.replace("_orig_mod.", "")


# ---- loading ------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], trainable: bool = False
) -> list[str]:
    """Put the adapters of `folder`, PEFT's or ours, on the model's 4-bit linears, in place.

    Adapters that the model had are replaced, once everything is found to fit. All other parameters
    are frozen, and the adapters' too unless trainable.

    Returns:
        the names of the modules that have an adapter now.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the config asks for what we do not have, or tensors and model
            do not fit; the message lists missing and unexpected keys and wrong shapes.
    """
    folder = Path(folder)
    config = _read_config(folder)
    settings = _AdapterSettings.of(config, folder)
    tensors = _read_tensors(folder)
    adapters = _fit(model, settings, tensors, folder)
    remove_lora(model)
    put_lora(model, {name: settings.options(name) for name in adapters})
    for name, layer in lora_layers(model):
        for ours, tensor in adapters[name].items():
            parameter = getattr(layer, ours)
            with torch.no_grad():
                parameter.copy_(tensor)
            parameter.requires_grad_(trainable)
    return list(adapters)


@dataclass
class _AdapterSettings:
    """What of PEFT's config bears on what is computed."""

    r: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | list[str] | None  # None: whatever the tensors name
    exclude_modules: str | list[str]

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> _AdapterSettings:
        path = folder / CONFIG_NAME
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{path}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
        used = [
            f"{option}={config[option]!r}"
            for option, unused in _UNUSED.items()
            if option in config and config[option] not in unused
        ]
        if config.get("init_lora_weights", True) not in _PLAIN_INITS:
            used.append(
                f"init_lora_weights={config['init_lora_weights']!r} (it changed the base weights)"
            )
        if used:
            raise ValueError(f"{path} asks for what is not supported: {', '.join(used)}")
        by_layer = config.get("layers_to_transform") not in (None, [])
        return cls(
            r=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            dropout=config.get("lora_dropout") or 0.0,
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            target_modules=None if by_layer else config.get("target_modules"),
            exclude_modules=config.get("exclude_modules") or [],
        )

    def options(self, name: str) -> dict[str, Any]:
        """QLoRALinear's options for this module."""
        return {
            "r": pattern_value(self.rank_pattern, name, self.r),
            "alpha": pattern_value(self.alpha_pattern, name, self.alpha),
            "dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }

    def wants(self, name: str, never: list[str]) -> bool:
        """Whether target_modules, where it tells, means this linear."""
        if self.target_modules is None or matches(name, self.exclude_modules):
            return False
        if self.target_modules == ALL_LINEAR:
            return name not in never
        return matches(name, self.target_modules)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no adapter's folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        old = folder / "adapter_model.bin"
        hint = " (adapter_model.bin, a pickle, is not read: save it as safetensors)"
        raise FileNotFoundError(f"{path} is missing{hint if old.is_file() else ''}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _fit(
    model: nn.Module, settings: _AdapterSettings, tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and parameter name; or an error that lists what does not fit."""
    layers = {_plain(name): (name, layer) for name, layer in quantized_layers(model)}
    if not layers:
        raise ValueError("the model has no quantized linear: call quantize(model) first")
    parts = [part for part in _TENSORS if part != "lora_magnitude" or settings.use_dora]
    never = output_embedding_names(model)
    adapted = {name for name in layers if settings.wants(name, never)}
    adapted |= {name for name in layers if _key(name, "lora_A") in tensors}

    found: dict[str, dict[str, Tensor]] = {}
    missing, wrong, known = [], [], set()
    for name in (name for name in layers if name in adapted):
        full_name, layer = layers[name]
        shapes = _shapes(layer, settings.options(name)["r"])
        for part in parts:
            key = _key(name, part)
            known.add(key)
            if key not in tensors:
                missing.append(key)
            elif tuple(tensors[key].shape) != shapes[part]:
                wrong.append(f"{key} {list(tensors[key].shape)}, not {list(shapes[part])}")
            else:
                found.setdefault(full_name, {})[part] = tensors[key]
    unexpected = sorted(set(tensors) - known)
    problems = _listed("missing", missing) + _listed("unexpected", unexpected)
    problems += _listed("of another shape", wrong)
    if problems:
        hint = _hint(model, unexpected, list(layers))
        raise ValueError(f"{folder / WEIGHTS_NAME} does not fit the model{hint}:{problems}")
    return found


def _shapes(layer: Linear4bit, r: int) -> dict[str, tuple[int, ...]]:
    return {
        "lora_A": (r, layer.in_features),
        "lora_B": (layer.out_features, r),
        "lora_magnitude": (layer.out_features,),
    }


def _key(name: str, part: str) -> str:
    return f"{_PREFIX}{name}.{_TENSORS[part]}"


def _listed(what: str, keys: list[str], n: int = 6) -> str:
    if not keys:
        return ""
    lines = [f"\n    {key}" for key in keys[:n]]
    if len(keys) > n:
        lines.append(f"\n    … and {len(keys) - n} more")
    return f"\n  {what} ({len(keys)}):{''.join(lines)}"


def _hint(model: nn.Module, unexpected: list[str], layers: list[str]) -> str:
    """Why the first unexpected key may be there."""
    for key in unexpected[:1]:
        name = key.removeprefix(_PREFIX).split(".lora_")[0]
        if any(name == _plain(other) for other, _ in model.named_modules()):
            return f" ({name} is not quantized, so cannot hold an adapter)"
        if close := near(name, layers):
            return f" (it has no {name}; did you mean {' or '.join(close)}?)"
    return ""
