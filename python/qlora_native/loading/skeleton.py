"""A model without its weights: built from a config alone, then filled tensor by tensor.

Parameters are on the meta device and cost nothing. Buffers are real, because those that no
checkpoint holds (a rotary embedding's inv_freq, say) must have the values that the model's own
constructor computes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.hf import hf
from qlora_native.loading.settings import QuantSettings
from qlora_native.model import quantize

Config = Any  # transformers.PretrainedConfig; transformers is optional and has no strict types
Model = Any  # transformers.PreTrainedModel


def read_config(folder: Path) -> Config:
    """The folder's config.json as transformers understands it."""
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {folder}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so it is no Hugging Face model folder"
        )
    try:
        return hf().AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error


def build_skeleton(config: Config, dtype: torch.dtype, settings: QuantSettings | None) -> Model:
    """The causal language model that `config` describes, parameters on meta, in eval mode.

    With `settings`, its linears are 4-bit layers that wait for their weights.
    """
    with _parameters_on_meta():
        try:
            model = hf().AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise CheckpointError(f"no causal language model for this config: {error}") from error
    if settings is not None:
        kept = [name for name in kept_in_float32(model, dtype) if _has_module(model, name)]
        quantize(
            model,
            format=settings.format,
            blocksize=settings.blocksize,
            double_quant=settings.double_quant,
            skip=[*settings.skip, *kept],
        )
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers meanwhile loses its storage.

    Modules make their parameters with torch.empty, whose pages nobody touches before they are
    dropped here.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def put_tensor(model: Model, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer `name` of `model` by `tensor`, frozen."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


class Fusion:
    """Tensors of a checkpoint that transformers makes others of while it loads: experts, mostly.

    `sources` are their names in the checkpoint; `convert` gives the model's tensors by name.
    """

    def __init__(self, model: Model, target: str, converter: Any) -> None:
        self.model = model
        self.target = target
        self.converter = converter
        self.sources: dict[str, str] = {}  # name -> the converter's pattern that it matches

    def convert(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What the sources amount to. `read` gives the tensor of a name."""
        for name in sorted(self.sources, key=hf("core_model_loading").dot_natural_key):
            self.converter.add_tensor(self.target, name, self.sources[name], partial(read, name))
        found = self.converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


def names_in_model(
    model: Model, checkpoint_names: list[str], expected: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, Fusion]]:
    """How transformers names and fuses this kind of model's tensors while it loads them.

    Returns:
        checkpoint name -> model name, and model name -> what is fused into it.
    """
    core = hf("core_model_loading")
    transforms = hf("conversion_mapping").get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, core.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core.WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    renamed: dict[str, str] = {}
    fusions: dict[str, Fusion] = {}
    for name in checkpoint_names:
        target, pattern = core.rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected
        )
        renamed[name] = target
        if pattern is not None and target not in checkpoint_names:
            if target not in fusions:
                converter = copy.deepcopy(by_pattern[pattern])
                fusions[target] = Fusion(model, target, converter)
            fusions[target].sources[name] = pattern
    return renamed, fusions


def kept_in_float32(model: Model, dtype: torch.dtype) -> set[str]:
    """Names of modules that this kind of model wants in float32 whatever `dtype` is."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


def _has_module(model: Model, part: str) -> bool:
    return any(part in name.split(".") for name, _ in model.named_modules())


def is_ignorable(model: Model, kind: Literal["missing", "unexpected"], name: str) -> bool:
    """Whether the model's class says that such a tensor does not matter."""
    patterns = [*(getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ())]
    if kind == "unexpected":
        # Persistent buffers of older transformers; today's models compute them.
        patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    return any(re.search(pattern, name) for pattern in patterns)
