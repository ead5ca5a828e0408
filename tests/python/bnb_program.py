"""A QLoRA program as people write it for bitsandbytes: it knows nothing of qlora_native.

    python bnb_program.py FOLDER OUT

FOLDER holds a float model. Writes OUT/quantized (a pre-quantized folder), OUT/adapter, the
Trainer's checkpoints, and OUT/results.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from accelerate.utils import is_4bit_bnb_available
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import is_bitsandbytes_available

STEPS = 20
IDS = torch.arange(3, 15).view(2, 6)


def quantized(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


def with_adapter(model: Any) -> Any:
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def train(model: Any, out: Path, optim: str, **more: Any) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (2 * STEPS, 12), generator=generator)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        optim=optim,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(**more)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: Any) -> list[float]:
    """In training mode, as the package computes in bfloat16 on some processors in the other."""
    return model.train()(IDS).logits.flatten().tolist()


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    base = quantized(folder)
    base.save_pretrained(out / "quantized")
    results: dict[str, object] = {
        "linears": sum(isinstance(m, bnb.nn.Linear4bit) for m in base.modules()),
        "footprint": base.get_memory_footprint(),
        "parameters": base.num_parameters(),
        "available": [is_bitsandbytes_available(), is_4bit_bnb_available()],
        "logits": logits(base),
    }
    model = with_adapter(base)
    results["trainable"] = model.get_nb_trainable_parameters()
    results["losses, 32-bit"] = train(model, out / "32bit", "adamw_torch")
    model.save_pretrained(out / "adapter")

    model = with_adapter(quantized(folder))
    results["losses, 8-bit"] = train(model, out / "8bit", "adamw_8bit")
    half = str(out / "8bit" / f"checkpoint-{STEPS // 2}")
    model = with_adapter(quantized(folder))
    results["losses, paged"] = train(model, out / "paged", "paged_adamw_32bit")
    model = with_adapter(quantized(folder))
    results["losses, resumed"] = train(
        model, out / "resumed", "adamw_8bit", resume_from_checkpoint=half
    )
    results["logits, adapted"] = logits(model)
    results["logits, merged"] = logits(model.merge_and_unload())

    read = AutoModelForCausalLM.from_pretrained(out / "quantized", dtype=torch.float32)
    results["logits, pre-quantized"] = logits(read)
    results["logits, dequantized"] = logits(read.dequantize())
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    print(bnb.__name__, importlib.metadata.version("bitsandbytes"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
