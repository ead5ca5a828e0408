"""QLoRA as a LightningModule: accumulation, bf16, checkpointing, evaluation, resuming.

python examples/lightning_module.py MODEL OUTPUT [--steps N] [--resume]
"""

import argparse

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import qlora_native as qn
from sums import make_sums


class QLoRA(lightning.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.strict_loading = False  # a checkpoint holds the adapter, not the base
        self.model, self.tokenizer = qn.load_model(name)
        qn.add_lora(self.model, r=8, alpha=16, dropout=0.05)
        self.model.train().gradient_checkpointing_enable()

    def training_step(self, batch, index):
        loss = self.model(**batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.log("eval_loss", self.model(**batch, use_cache=False).loss)

    def configure_optimizers(self):
        return qn.optim.AdamW8bit((p for p in self.parameters() if p.requires_grad), lr=2e-3)

    def state_dict(self, *args, **kwargs):
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a model's folder or its name on the Hub")
parser.add_argument("output", help="folder of the adapter and of the state to resume from")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

lightning.seed_everything(0)
module = QLoRA(args.model)
train = DataLoader(make_sums(module.tokenizer, 64), batch_size=4, shuffle=True)
evaluation = DataLoader(make_sums(module.tokenizer, 8, seed=1), batch_size=8)
trainer = lightning.Trainer(
    accelerator="cpu",
    precision="bf16-mixed",
    accumulate_grad_batches=2,
    max_steps=args.steps,
    logger=False,
    enable_progress_bar=False,
    callbacks=[ModelCheckpoint(args.output, filename="state", save_last=True)],
)


def evaluate():
    (metrics,) = trainer.validate(module, evaluation, verbose=False)
    print(f"evaluation loss {metrics['eval_loss']:.4f} after {trainer.global_step}")


evaluate()
trainer.fit(module, train, ckpt_path=f"{args.output}/last.ckpt" if args.resume else None)
evaluate()
qn.save_adapter(module.model, f"{args.output}/adapter")
