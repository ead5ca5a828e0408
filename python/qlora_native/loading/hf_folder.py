"""A Hugging Face folder becomes a model whose linears are 4-bit, one tensor at a time.

At any moment memory holds what is loaded so far, in its final form, and one tensor as the file has
it. Tensors are taken in the order of the files. A weight is quantized from the file's own dtype
(not from `dtype`: rounding to 16 bits first would cost accuracy); everything else is cast to
`dtype`. A folder that bitsandbytes or `save_quantized` wrote has packed weights, which are taken as
they are. FP8 weights are decoded; so are GPTQ's and AWQ's where `settings.requantize` allows it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_native.experts import Experts4bit, StackedLinear4bit, is_experts, stored_shape
from qlora_native.linear import Linear4bit
from qlora_native.loading import fp8, packed_integers
from qlora_native.loading.checkpoint_index import CheckpointIndex
from qlora_native.loading.cost import QuantizationCost
from qlora_native.loading.encoded import DecodedIndex
from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.hf import hf
from qlora_native.loading.settings import QuantSettings
from qlora_native.loading.skeleton import (
    Fusion,
    Model,
    build_skeleton,
    is_ignorable,
    kept_in_float32,
    names_in_model,
    put_tensor,
    read_config,
)
from qlora_native.loading.stored_form import (
    BITSANDBYTES,
    FLOAT,
    FP8,
    StoredForm,
    refuse_again,
    stored_form,
)
from qlora_native.quant_state import WEIGHT_DTYPES, QuantState

# What bitsandbytes stores beside a packed weight, all under the weight's own name.
_STATE_SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)


def load_folder(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    settings: QuantSettings | None,
    strict: bool = True,
    cost: QuantizationCost | None = None,
) -> Model:
    """The folder's causal language model, its linears quantized by `settings` (None: not).

    Raises CheckpointError for missing, unexpected (if `strict`), damaged or mis-shaped tensors and
    for weights that another method has quantized.
    """
    config = read_config(folder)
    form = stored_form(getattr(config, "quantization_config", None), str(folder))
    if form.method != FLOAT:
        del config.quantization_config  # `save_quantized` writes it; a merged model has none
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    is_again = form.is_integer and settings is not None
    with CheckpointIndex(folder) as files:
        index = _decoded(files, form)
        if is_again and settings is not None:
            cost = cost or QuantizationCost()
            if not settings.requantize:
                refuse_again(form, str(folder), _loss_of_one(index, settings))
        # Packed weights tell themselves which linears are 4-bit ones.
        model = build_skeleton(config, dtype, None if form.method == BITSANDBYTES else settings)
        _Filling(model, index, dtype, strict, cost).run()
    if is_again and cost is not None:
        warnings.warn(
            f"{folder} was quantized by {form.method.upper()} and now to 4 bits again: that moved "
            f"its weights by {cost.relative_error:.2%} (relative error), beyond what they had lost",
            stacklevel=2,
        )
    model.name_or_path = config._name_or_path = str(folder)
    _read_generation_config(model, folder)
    return model


def _decoded(files: CheckpointIndex, form: StoredForm) -> CheckpointIndex | DecodedIndex:
    """The files' tensors, those that another method has encoded as floats."""
    if form.method == FP8:
        return fp8.decode_index(files, form)
    return packed_integers.decode_index(files, form) if form.is_integer else files


def _loss_of_one(index: CheckpointIndex | DecodedIndex, settings: QuantSettings) -> str:
    """What quantizing the first encoded weight again would cost, for a message."""
    name = next(
        (n for n in index.names() if isinstance(index, DecodedIndex) and n in index.encoded), ""
    )
    if not name:
        return ""
    weight = index.read(name)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = Linear4bit.from_linear(
        linear,
        format=settings.format,
        blocksize=settings.blocksize,
        double_quant=settings.double_quant,
    )
    cost = QuantizationCost()
    cost.add(name, weight, layer)
    return f": {name!r} would move by {cost.relative_error:.2%} (relative error)"


class _Filling:
    """One pass over the checkpoint's tensors into an empty model."""

    def __init__(
        self,
        model: Model,
        index: CheckpointIndex | DecodedIndex,
        dtype: torch.dtype,
        strict: bool,
        cost: QuantizationCost | None,
    ) -> None:
        self.model = model
        self.index = index
        self.dtype = dtype
        self.strict = strict
        self.cost = cost
        self.buffer: Tensor | None = None  # uint8, as long as the largest tensor
        self.kept_in_float32 = kept_in_float32(model, dtype)
        # Names and shapes of the float model, whatever of it is 4-bit.
        self.expected = _float_shapes(model)
        self.state_keys: dict[str, dict[str, str]] = {}  # weight's name -> {suffix: tensor's name}

    def run(self) -> None:
        names = self._set_state_keys_apart(self.index.names())
        renamed, fusions = names_in_model(self.model, names, self.expected)
        unexpected = []
        found: set[str] = set()
        for name in names:
            target = renamed[name]
            if target in fusions:
                if target not in found:
                    found |= self._put_fused(fusions[target])
            elif target in self.expected:
                self._put(name, target)
            elif not is_ignorable(self.model, "unexpected", target):
                unexpected.append(name)
            found.add(target)
        self._finish(set(self.expected) - found, unexpected)

    def _set_state_keys_apart(self, names: list[str]) -> list[str]:
        """Collect the keys of packed weights in `state_keys`; return the others."""
        rest = []
        every = set(names)
        for name in names:
            suffix = next((suffix for suffix in _STATE_SUFFIXES if name.endswith(suffix)), None)
            weight = name.removesuffix(suffix) if suffix else ""
            if suffix and (weight.endswith("weight") or weight in every):
                self.state_keys.setdefault(weight, {})[suffix] = name
            else:
                rest.append(name)
        present = set(rest)
        for weight, keys in self.state_keys.items():
            if weight not in present:
                state_name = next(iter(keys.values()))
                raise CheckpointError(
                    f"{self.index.file_of(state_name)} holds {state_name!r}, but no file of the "
                    f"folder holds {weight!r}"
                )
        return rest

    def _put(self, name: str, target: str) -> None:
        if name in self.state_keys:
            self._put_packed(name, target)
            return
        self._check_shape(name, target, self.index.entry(name).shape)
        if (layer := self._quantized_at(target)) is not None:
            self._put_quantized(name, target, layer, self._read_for_a_moment(name))
        else:
            self._put_float(name, target)

    def _put_fused(self, fusion: Fusion) -> set[str]:
        """Put what several tensors of the checkpoint amount to; return its names."""
        source = min(fusion.sources)
        try:
            fused = fusion.convert(self.index.read)
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.index.file_of(source)}: {_listed(sorted(fusion.sources))} cannot be fused "
                f"into {fusion.target!r}: {error}"
            ) from error
        names = set(fused)
        if not names <= self.expected.keys():
            unknown = _listed(sorted(names - self.expected.keys()))
            raise CheckpointError(
                f"{self.index.file_of(source)}: tensor {source!r} is part of {unknown}, of which "
                "the config knows nothing"
            )
        for target in names:
            tensor = fused.pop(target)
            self._check_shape(source, target, tensor.shape)
            if (layer := self._quantized_at(target)) is not None:
                self._put_quantized(source, target, layer, tensor)
            else:
                put_tensor(self.model, target, tensor.to(self._dtype_of(target, tensor.dtype)))
        return names

    def _check_shape(self, name: str, target: str, shape: tuple[int, ...]) -> None:
        if shape != self.expected[target]:
            raise CheckpointError(
                f"{self.index.file_of(name)}: tensor {name!r} has shape {list(shape)}, "
                f"the config asks for {list(self.expected[target])}"
            )

    def _quantized_at(self, target: str) -> Linear4bit | None:
        """The 4-bit layer whose weight the tensor of this name is, if it is one's."""
        module_name, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(module_name)
        if isinstance(module, Linear4bit) and leaf == "weight":
            return module
        stack = module._modules.get(leaf)
        return stack if isinstance(stack, StackedLinear4bit) else None

    def _put_quantized(self, name: str, target: str, layer: Linear4bit, weight: Tensor) -> None:
        if weight.dtype not in WEIGHT_DTYPES and weight.is_floating_point():
            weight = weight.float()
        if layer.fan_in_fan_out:
            weight = weight.mT.contiguous()
        try:
            layer.quantize_weight(weight)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.index.file_of(name)}: tensor {name!r} cannot be quantized: {error}"
            ) from error
        if self.cost is not None:
            self.cost.add(target.removesuffix(".weight"), weight, layer)

    def _put_packed(self, name: str, target: str) -> None:
        keys = self.state_keys[name]
        parts = {f"weight{suffix}": self.index.read(key) for suffix, key in keys.items()}
        module_name, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(module_name)
        if is_experts(module):
            module = Experts4bit.from_module(module)  # of parameters on meta, which nothing fills
            self.model.set_submodule(module_name, module.eval())
        if isinstance(module, Experts4bit):
            self._put_packed_stack(name, dict(module.stacks())[leaf], parts)
            return
        fan_in_fan_out = type(module).__name__ == "Conv1D"  # GPT-2's; packed as [out, in]
        try:
            if not (isinstance(module, nn.Linear) or fan_in_fan_out):
                raise ValueError(f"{module_name!r} is no linear but a {type(module).__name__}")
            state = QuantState.from_bnb_dict(parts)
            wanted = self.expected[target][::-1] if fan_in_fan_out else self.expected[target]
            if state.shape != wanted:
                raise ValueError(f"its shape is {list(state.shape)}, not {list(wanted)}")
            layer = Linear4bit.from_tensors(self.index.read(name), state, module.bias)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.index.file_of(name)}: packed tensor {name!r} cannot be used: "
                f"{error.args[0]}"
            ) from error
        layer.fan_in_fan_out = fan_in_fan_out
        self.model.set_submodule(module_name, layer.eval())

    def _put_packed_stack(
        self, name: str, stack: StackedLinear4bit, parts: dict[str, Tensor]
    ) -> None:
        try:
            state = QuantState.from_bnb_dict(parts)
            if state.shape != stack.shape:
                raise ValueError(f"its shape is {list(state.shape)}, not {list(stack.shape)}")
            stack.take(self.index.read(name), state)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.index.file_of(name)}: packed tensor {name!r} cannot be used: "
                f"{error.args[0]}"
            ) from error

    def _put_float(self, name: str, target: str) -> None:
        stored = self.index.entry(name).dtype
        wanted = self._dtype_of(target, stored)
        if stored == wanted:
            put_tensor(self.model, target, self.index.read(name))
        else:
            put_tensor(self.model, target, self._read_for_a_moment(name).to(wanted))

    def _dtype_of(self, target: str, stored: torch.dtype) -> torch.dtype:
        if not stored.is_floating_point:
            return stored
        keep = not self.kept_in_float32.isdisjoint(target.split("."))
        return torch.float32 if keep else self.dtype

    def _read_for_a_moment(self, name: str) -> Tensor:
        """A tensor that the next call overwrites.

        Were each read into memory of its own, the heap would end up as holes, each too small for
        the next tensor, between what was kept: some 30 MB on a model of 50.
        """
        if self.buffer is None:
            largest = max(self.index.entry(name).nbytes for name in self.index.names())
            self.buffer = torch.empty(largest, dtype=torch.uint8)
        return self.index.read(name, self.buffer)

    def _finish(self, missing: set[str], unexpected: list[str]) -> None:
        """Tie what is tied, then see that nothing is missing or left over."""
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        missing = {name for name in missing if not is_ignorable(self.model, "missing", name)}
        if missing:
            raise CheckpointError(
                f"{self.index.folder} lacks {_listed(sorted(missing))}, which its config.json "
                "asks for; download or copy it again"
            )
        if unexpected and self.strict:
            raise CheckpointError(
                f"{self.index.file_of(unexpected[0])} holds {_listed(unexpected)}, of which its "
                "config.json knows nothing; if the rest is the model that you want, load it with "
                "strict=False"
            )


def _float_shapes(model: Model) -> dict[str, torch.Size]:
    """Shape of each tensor that an un-quantized checkpoint of `model` holds."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, StackedLinear4bit):
            for key in [key for key in shapes if key.startswith(f"{name}.")]:
                del shapes[key]
            shapes[name] = stored_shape(module)
        elif isinstance(module, Linear4bit):
            for key in [key for key in shapes if key.startswith(f"{name}.weight.")]:
                del shapes[key]
            shape = (module.out_features, module.in_features)
            shapes[f"{name}.weight"] = torch.Size(shape[::-1] if module.fan_in_fan_out else shape)
    return shapes


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return f"the tensor {names[0]!r}"
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} tensors ({shown}{', …' * (len(names) > 3)})"


def _read_generation_config(model: Model, folder: Path) -> None:
    """The folder's generation defaults, where it has some."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = hf().GenerationConfig.from_pretrained(folder)
