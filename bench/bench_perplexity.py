"""Held-out perplexity after training: does ours learn what peft + bitsandbytes learn?

The demo's dialogues; the same start of the adapters, the same batches in the same order, the same
settings, in fp32. Both are evaluated before training and after (see learners.py on what that does
to bitsandbytes).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.case import OURS
from bench.learners import BITSANDBYTES, Learner, make, model_folder, names
from bench.section import Section
from qlora_native.collate import Batch, BatchPlan
from qlora_native.data import IGNORE, Example
from qlora_native.evaluate import Evaluation, evaluate
from qlora_native.schedule import Schedule

TITLE = "Held-out perplexity"
STEPS, LEARNING_RATE, WARMUP = 40, 5e-4, 4
ROWS, LENGTH = 4, 256


def _demo_examples(folder: Path) -> tuple[list[Example], list[Example]]:
    """Training and held-out dialogues of chatterbot-corpus; the answers alone are learned."""
    from transformers import AutoTokenizer

    from qlora_native.data import tokenize
    from qlora_native.demo.corpus import load_split, write_records
    from qlora_native.records import read_records

    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = load_split()
    examples = []
    with TemporaryDirectory() as temporary:
        for name, dialogues in (("train", split.train), ("held_out", split.held_out)):
            path = Path(temporary) / f"{name}.jsonl"
            write_records(path, dialogues)
            records = read_records([path])
            examples.append(tokenize(records, tokenizer, max_length=LENGTH)[0])
    return examples[0], examples[1]


def _tiny_examples() -> tuple[list[Example], list[Example]]:
    """Counting, for the smoke test."""
    sequences = [tuple(range(start, start + 16)) for start in range(1, 200, 3)]
    examples = [Example(str(ids[0]), ids, (IGNORE, *ids[1:])) for ids in sequences]
    return examples[::2], examples[1::2]


def _train(learner: Learner, plan: BatchPlan, steps: int) -> None:
    schedule = Schedule("cosine", LEARNING_RATE, steps, min(WARMUP, steps))
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    for step, batch in zip(range(steps), plan.stream(), strict=False):
        learner.optimizer.zero_grad(set_to_none=True)
        learner.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in learner.optimizer.param_groups:
            group["lr"] = schedule(step)
        learner.optimizer.step()
        print(f"\r  step {step + 1} of {steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def section(quick: bool) -> Section:
    folder = model_folder(quick)
    training, held_out = _tiny_examples() if quick else _demo_examples(folder)
    plan, held_out_plan = (
        BatchPlan(examples, ROWS, LENGTH, True, False, pad_id=0, seed=0)
        for examples in (training, held_out)
    )
    batches: list[Batch] = held_out_plan.in_order()
    steps = 2 if quick else STEPS

    contenders = [name for name in (OURS, BITSANDBYTES) if name in names()]
    torch.manual_seed(0)
    learners = {
        name: make(name, folder, torch.float32, LEARNING_RATE, evaluated_before=True)
        for name in contenders
    }
    for name in contenders[1:]:
        learners[name].start_from(learners[OURS])
    results: dict[str, tuple[Evaluation, Evaluation]] = {}
    for name, learner in learners.items():
        print(f"  {name}", file=sys.stderr, flush=True)
        before = evaluate(learner.model, batches)
        _train(learner, plan, steps)
        results[name] = (before, evaluate(learner.model, batches))

    ours = results[OURS][1].perplexity
    lines = [
        f"{steps} steps of {ROWS} rows of {LENGTH} tokens, packed, r = 16 on all linears, learning "
        f"rate {LEARNING_RATE}, cosine, fp32; {results[OURS][0].tokens} held-out tokens.",
        "",
        "| | before | after | ± | to ours |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {before.perplexity:.3f} | {after.perplexity:.3f} "
        f"| {after.perplexity_stderr:.3f} | {after.perplexity / ours - 1:+.2%} |"
        for name, (before, after) in results.items()
    ]
    data = {
        name: {
            "before": before.perplexity,
            "after": after.perplexity,
            "after_stderr": after.perplexity_stderr,
            "steps": steps,
        }
        for name, (before, after) in results.items()
    }
    return Section(TITLE, "\n".join(lines), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(section(args.quick).markdown)
