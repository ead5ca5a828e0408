"""The same transformers + peft script with bitsandbytes' 4-bit layers and with ours, side by side.

Both quantize the same folder through from_pretrained(quantization_config=BitsAndBytesConfig(…)),
get the same adapters from the same seed, and take 20 steps on the same batches in turns. Ours has
one line more: qlora_native.integrations.transformers.handle_bitsandbytes(). Afterwards each loads
the adapter that the other saved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import OURS
from bench.learners import ALPHA, BITSANDBYTES, DTYPES, R, keep_unpacked, model_folder
from bench.peers import installed
from bench.section import Section
from bench.tables import ratio

TITLE = "The same transformers + peft script"
STEPS = 20
TOKENS = (64, 256)  # in a step
WARM_UP = 2  # steps that are not timed


@dataclass
class Run:
    """One contender: its model, its optimizer, and what its steps gave."""

    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, ids: Tensor) -> None:
        begin = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)


def load(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The quantized base model."""
    import transformers

    from qlora_native.integrations.transformers import handle_bitsandbytes

    handle_bitsandbytes(name == OURS)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config
        )
    finally:
        handle_bitsandbytes(False)


def start(name: str, folder: Path, dtype: torch.dtype) -> Run:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(name, folder, dtype), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Run(model, torch.optim.AdamW(trained, lr=2e-4))


def compare(folder: Path, dtype: torch.dtype, tokens: int, steps: int) -> dict[str, Any]:
    """Losses and seconds of both, step by step, and how far each is from the other's adapter."""
    runs = {name: start(name, folder, dtype) for name in (OURS, BITSANDBYTES)}
    vocabulary = next(iter(runs.values())).model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        ids = torch.randint(3, vocabulary, (1, tokens), generator=generator)
        # In turns, and each of them first as often.
        for name in list(runs)[:: 1 if number % 2 else -1]:
            runs[name].step(ids)
    mine, theirs = runs[OURS], runs[BITSANDBYTES]
    timed = slice(WARM_UP if steps > WARM_UP else 0, None)
    pairs = list(zip(theirs.seconds[timed], mine.seconds[timed], strict=True))
    return {
        "losses": {name: run.losses for name, run in runs.items()},
        "seconds": {name: run.seconds[timed] for name, run in runs.items()},
        "speedup_of_ours": statistics.median(b / a for b, a in pairs),
        "loss_difference": max(
            abs(a - b) / abs(b) for a, b in zip(mine.losses, theirs.losses, strict=True)
        ),
        "exchange_difference": _exchange(runs, folder, dtype, ids),
    }


@torch.no_grad()
def _exchange(runs: dict[str, Run], folder: Path, dtype: torch.dtype, ids: Tensor) -> float:
    """The largest relative difference of logits when one loads what the other saved."""
    import peft

    worst = 0.0
    with tempfile.TemporaryDirectory() as saved:
        for name, other in ((OURS, BITSANDBYTES), (BITSANDBYTES, OURS)):
            runs[name].model.save_pretrained(f"{saved}/{name}")
            keep_unpacked(runs[name].model)
            want = runs[name].model.eval()(input_ids=ids).logits.float()
            base = load(other, folder, dtype)
            keep_unpacked(base)
            got = peft.PeftModel.from_pretrained(base, f"{saved}/{name}")(input_ids=ids).logits
            worst = max(worst, float((got.float() - want).norm() / want.norm()))
    return worst


def section(quick: bool, dtypes: list[str] | None = None) -> Section:
    if not all(map(installed, ("transformers", "peft", "bitsandbytes"))):
        return Section(TITLE, "transformers, peft or bitsandbytes is not installed.", {})
    folder = model_folder(quick)
    data = {}
    for dtype in dtypes or (["float32"] if quick else list(DTYPES)):
        for tokens in (16,) if quick else TOKENS:
            print(f"  {dtype}, {tokens} tokens", file=sys.stderr, flush=True)
            steps = 2 if quick else STEPS
            data[f"{dtype}, {tokens} tokens"] = compare(folder, DTYPES[dtype], tokens, steps)
    lines = [
        "SmolLM2-135M-Instruct through from_pretrained and get_peft_model, r = 16 on all linears, "
        f"torch's AdamW, {STEPS} steps in turns, {torch.get_num_threads()} threads; "
        "medians. *Losses* and *exchanged adapters* are the largest relative differences between "
        "the two: of a step's loss, and of the logits where one loads the adapter of the other.",
        "",
        "| step | ours | bitsandbytes | ours is faster | losses | exchanged adapters |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for step, found in data.items():
        mine, theirs = (statistics.median(found["seconds"][n]) for n in (OURS, BITSANDBYTES))
        lines.append(
            f"| {step} | {mine:.3f} s | {theirs:.3f} s | {ratio(found['speedup_of_ours'])} "
            f"| {found['loss_difference']:.1e} | {found['exchange_difference']:.1e} |"
        )
    return Section(TITLE, "\n".join(lines), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(section(args.quick, args.dtype).markdown)
