"""`load_model`: finds out what kind of source it has, and asks the right reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_native.files import default_cache_dir
from qlora_native.loading.cache import QuantizedCache
from qlora_native.loading.cost import QuantizationCost
from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.gguf_source import load_gguf, read_gguf_config
from qlora_native.loading.hf import hf
from qlora_native.loading.hf_folder import load_folder
from qlora_native.loading.settings import QuantSettings
from qlora_native.loading.skeleton import Model, build_skeleton, read_config
from qlora_native.loading.sources import locate
from qlora_native.loading.stored_form import refuse_again, stored_form
from qlora_native.model import quantize as quantize_model


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    cache_dir: str | Path | None = None,
    quantize: bool = True,
    skip: Sequence[str] = ("lm_head",),
    strict: bool = True,
    requantize: bool = False,
    cost: QuantizationCost | None = None,
) -> tuple[Model, Any]:
    """Load a causal language model with 4-bit linears, and its tokenizer.

    Args:
        source: a Hugging Face folder of safetensors; a quantized folder (ours or bitsandbytes'),
            whose own format then stands; a folder of FP8 weights, which are decoded; a `.gguf`
            file; "demo" or the name of an installed package that holds one GGUF file; or the name
            of a model on the Hugging Face Hub (`owner/name`), which is downloaded once.
        dtype: dtype of what is not quantized, and so of the activations. None: the source's own
            (GGUF: float32).
        format, blocksize, double_quant: how linears are quantized, see `functional.quantize_4bit`.
        cache_dir: where the quantized model is kept for the next load. None: GGUF files, which are
            slow to read, in $QLORA_NATIVE_CACHE or the XDG cache directory; folders, which load
            fast as they are, not at all.
        quantize: False loads the model un-quantized, in `dtype`.
        skip: names of modules that are left un-quantized.
        strict: refuse a folder that holds tensors which its config does not ask for.
        requantize: quantize weights that GPTQ or AWQ has quantized already, which compounds the
            loss; a warning gives the relative error. Otherwise they are refused, unless quantize
            is False.
        cost: is told what quantizing each weight costs; nothing is taken from the cache then.

    Returns:
        The model in eval mode, all parameters frozen, and the tokenizer as transformers has it.

    Raises:
        CheckpointError: the source is missing, damaged, incomplete or of a kind that cannot be
            read. It names the file, and the tensor where there is one.
        ModuleNotFoundError: transformers (extra `hf`) is not installed.
    """
    path = locate(source)
    settings = None
    if quantize:
        settings = QuantSettings(format, blocksize, double_quant, tuple(skip), requantize)
    if settings is None or cost is not None or (cache_dir is None and path.is_dir()):
        return _load(path, dtype, settings, strict, cost)
    directory = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    cache = QuantizedCache(directory, path, dtype, settings)
    if cache.is_good():
        model, tokenizer = _load(cache.folder, None, settings, strict=True)
        model.name_or_path = model.config._name_or_path = str(path)
    else:
        model, tokenizer = _load(path, dtype, settings, strict)
        cache.store(model, tokenizer)
    return model, tokenizer


def _load(
    path: Path,
    dtype: torch.dtype | None,
    settings: QuantSettings | None,
    strict: bool,
    cost: QuantizationCost | None = None,
) -> tuple[Model, Any]:
    if path.is_dir():
        model = load_folder(path, dtype=dtype, settings=settings, strict=strict, cost=cost)
        tokenizer = read_tokenizer(path)
    else:
        model, tokenizer = load_gguf(path, dtype)
        if settings is not None:
            _quantize_in_place(model, settings, cost)
    return model.requires_grad_(False), tokenizer


def _quantize_in_place(
    model: Model, settings: QuantSettings, cost: QuantizationCost | None
) -> None:
    """`cost` needs the weights as they were, so that they are kept until it has seen them."""
    weights = {}
    if cost is not None:
        weights = {name: p.detach() for name, p in model.named_parameters()}
    done = quantize_model(
        model,
        format=settings.format,
        blocksize=settings.blocksize,
        double_quant=settings.double_quant,
        skip=settings.skip,
    )
    if cost is not None:
        for name in done.quantized:
            layer = model.get_submodule(name)
            weight = weights[name if name in weights else f"{name}.weight"]
            cost.add(name, weight.mT if layer.fan_in_fan_out else weight, layer)


def outline(source: str | Path, dtype: torch.dtype, settings: QuantSettings) -> Model:
    """The 4-bit model that `load_model` would give, on the meta device: no weight is read."""
    path = locate(source)
    config = read_config(path) if path.is_dir() else read_gguf_config(path)
    form = stored_form(getattr(config, "quantization_config", None), str(path))
    if form.is_integer and not settings.requantize:
        refuse_again(form, str(path))
    return build_skeleton(config, dtype, settings).requires_grad_(False)


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer with its chat template, as transformers has it."""
    try:
        return hf().AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no tokenizer that transformers can read "
            f"({' '.join(str(error).split())[:200]}); copy tokenizer.json and "
            "tokenizer_config.json beside the model"
        ) from error
