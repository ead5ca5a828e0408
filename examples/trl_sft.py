"""QLoRA with trl's SFTTrainer: conversations, accumulation, bf16, checkpointing, resuming.

python examples/trl_sft.py MODEL OUTPUT [--steps N] [--resume]
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from qlora_native.integrations.transformers import QLoRANativeConfig
from qlora_native.optim import AdamW8bit
from sums import conversations

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a model's folder or its name on the Hub")
parser.add_argument("output", help="folder of the adapter and of the state to resume from")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

set_seed(0)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(args.model, quantization_config=QLoRANativeConfig()),
    SFTConfig(
        args.output,
        max_steps=args.steps,
        save_steps=args.steps // 2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(conversations(64)),
    eval_dataset=Dataset.from_list(conversations(8, seed=1)),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
    optimizer_cls_and_kwargs=(AdamW8bit, {"lr": 2e-3}),
)
print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f} after 0")
trainer.train(resume_from_checkpoint=args.resume)
print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f} after {trainer.state.global_step}")
trainer.save_model(f"{args.output}/adapter")
