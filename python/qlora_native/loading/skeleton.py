"""A model without its weights: built from a config alone, then filled tensor by tensor.

Parameters are on the meta device and cost nothing. Buffers are real, because those that no
checkpoint holds (a rotary embedding's inv_freq, say) must have the values that the model's own
constructor computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def names_in_model(
    model: Model, checkpoint_names: list[str], expected: Mapping[str, object]
) -> dict[str, str]:
    """Checkpoint name to model name, by the renamings that transformers has for this kind of model.

    A kind whose weights transformers fuses or splits while it loads (experts, mostly) is refused:
    their tensors are no linears that could be quantized one by one.
    """
    core = hf("core_model_loading")
    transforms = hf("conversion_mapping").get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, core.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, core.WeightConverter)]
    renamed = {}
    for name in checkpoint_names:
        target, converted_by = core.rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected
        )
        if converted_by is not None and target not in checkpoint_names:
            raise CheckpointError(
                f"models of type {model.config.model_type!r} cannot be loaded: tensor {name!r} "
                f"must be fused with others into {target!r}, which has no 4-bit form here"
            )
        renamed[name] = target
    return renamed


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
