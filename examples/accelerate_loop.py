"""QLoRA in a plain loop of accelerate: accumulation, bf16, checkpointing, evaluation, resuming.

python examples/accelerate_loop.py MODEL OUTPUT [--steps N] [--resume]
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, default_collate

import qlora_native as qn
from sums import make_sums

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a model's folder or its name on the Hub")
parser.add_argument("output", help="folder of the adapter and of the state to resume from")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16", cpu=True)
torch.manual_seed(0)
model, tokenizer = qn.load_model(args.model)
qn.add_lora(model, r=8, alpha=16, dropout=0.05)
model.train().gradient_checkpointing_enable()

loader = DataLoader(make_sums(tokenizer, 64), batch_size=4, shuffle=True)
evaluation = default_collate(make_sums(tokenizer, 8, seed=1))
optimizer = qn.optim.AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=2e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step = 0
if args.resume:
    accelerator.load_state(f"{args.output}/state")
    step = int(Path(args.output, "step").read_text())


def batches():
    while True:
        yield from loader


def evaluate():
    model.eval()
    with torch.no_grad():
        loss = model(**evaluation).loss
    model.train()
    return loss.item()


print(f"evaluation loss {evaluate():.4f} after {step}")
for batch in batches():
    with accelerator.accumulate(model):
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    step += accelerator.sync_gradients
    if step == args.steps:
        break
print(f"evaluation loss {evaluate():.4f} after {step}")

accelerator.save_state(f"{args.output}/state")
Path(args.output, "step").write_text(str(step))
qn.save_adapter(accelerator.unwrap_model(model), f"{args.output}/adapter")
