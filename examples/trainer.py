"""QLoRA with transformers' Trainer and peft: accumulation, bf16, checkpointing, resuming.

python examples/trainer.py MODEL OUTPUT [--steps N] [--resume] [--reentrant]
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from qlora_native.integrations.transformers import QLoRANativeConfig
from qlora_native.optim import AdamW8bit
from sums import make_sums

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a model's folder or its name on the Hub")
parser.add_argument("output", help="folder of the adapter and of the state to resume from")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--reentrant", action="store_true", help="the older kind of checkpointing")
args = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=QLoRANativeConfig())
model = get_peft_model(
    model,
    LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
)

trainer = Trainer(
    model,
    TrainingArguments(
        args.output,
        max_steps=args.steps,
        save_steps=args.steps // 2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": args.reentrant},
        bf16=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        report_to="none",
    ),
    train_dataset=make_sums(tokenizer, 64),
    eval_dataset=make_sums(tokenizer, 8, seed=1),
    optimizer_cls_and_kwargs=(AdamW8bit, {"lr": 2e-3}),
)
print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f} after 0")
trainer.train(resume_from_checkpoint=args.resume)
print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f} after {trainer.state.global_step}")
model.save_pretrained(f"{args.output}/adapter")
