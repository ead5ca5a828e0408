"""Puts the figures of docs/benchmarks.json into the README, between its bench markers.

    python -m bench.readme              # write them
    python -m bench.readme --check      # exit 1 where the README says something else

So the README never says a figure that the report does not have.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

from bench import record
from bench.case import OURS, is_ours
from bench.record import Record
from bench.tables import ratio, share

ROOT = Path(__file__).parent.parent
MARKERS = re.compile(r"(?<=<!-- bench:begin -->\n).*?(?=<!-- bench:end -->)", re.DOTALL)

# section -> case -> what the README calls it; all of 4096 × 4096
CASES = {
    "Quantize and dequantize": {
        "quantize NF4 into fresh outputs, 4096 × 4096, float32": "quantize, fp32",
        "quantize NF4 into fresh outputs, 4096 × 4096, bfloat16": "quantize, bf16",
        "dequantize NF4 into a fresh output, 4096 × 4096, float32": "dequantize, fp32",
        "dequantize NF4 into a fresh output, 4096 × 4096, bfloat16": "dequantize, bf16",
        "dequantize NF4 into a reused output, 4096 × 4096, bfloat16": "the same, reused output",
    },
    "4-bit linear": {
        "forward, 4096 × 4096, M=1, float32": "linear, M = 1, fp32",
        "forward, 4096 × 4096, M=1, bfloat16": "linear, M = 1, bf16",
        "LoRA r=16 forward + backward, 4096 × 4096, M=512, float32": (
            "LoRA forward + backward, M = 512, fp32"
        ),
        "LoRA r=16 forward + backward, 4096 × 4096, M=512, bfloat16": (
            "LoRA forward + backward, M = 512, bf16"
        ),
    },
    "AdamW step": {
        "AdamW 32-bit, 4096 × 4096, float32": "AdamW, 32-bit state",
        "AdamW 8-bit, 4096 × 4096, float32": "AdamW, 8-bit state",
    },
}


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _op_rows(report: Record, isa: str) -> list[str]:
    """Ours as it runs by itself: forced to a narrower set it would meet peers that are not."""
    found = {
        row["case"]: row
        for section in CASES
        for row in record.data(report, section, [])
        if row["isa"] == isa
    }
    labels = {case: label for cases in CASES.values() for case, label in cases.items()}
    return [_op_row(label, found[case]) for case, label in labels.items() if case in found]


def _op_row(label: str, row: dict[str, Any]) -> str:
    contenders = row["contenders"]
    speedups = ", ".join(
        f"{ratio(measured['speedup_of_ours'])} {name}"
        for name, measured in contenders.items()
        if not is_ours(name)
    )
    ours = _milliseconds(contenders[OURS]["median_seconds"])
    return f"| {label} | {ours} | {share(row['of_limit'])} | {speedups} |"


def _step_line(step: dict[str, Any]) -> str:
    """Each contender in its best dtype."""
    best: dict[str, tuple[float, float, str]] = {}
    for key, measured in step.items():
        name, dtype = key.split()
        seconds = statistics.median(measured["seconds"])
        stepping = measured["memory"]["stepping"] / 2**20
        best[name] = min(best.get(name, (seconds, stepping, dtype)), (seconds, stepping, dtype))
    told = ", ".join(
        f"{name} {seconds:.2f} s and {memory:.0f} MiB ({dtype})"
        for name, (seconds, memory, dtype) in best.items()
    )
    return f"One training step of SmolLM2-135M, LoRA r = 16 on all linears, 4 × 256 tokens: {told}."


def _perplexity_line(perplexity: dict[str, Any]) -> str:
    told = ", ".join(
        f"{name} {result['before']:.2f} → {result['after']:.2f}"
        for name, result in perplexity.items()
    )
    steps = next(iter(perplexity.values()))["steps"]
    return f"Held-out perplexity over the same {steps} steps: {told}."


def render(report: Record) -> str:
    """The README's part, from the report's data."""
    machine = report["machine"]
    isa = machine["isas"][-1]  # the widest, which is the default
    about = (
        f"{machine['processor']} ({isa}), {machine['threads']} threads, {record.days(report)}, "
        f"torch {machine['torch']}, bitsandbytes {machine['bitsandbytes']}; 4096 × 4096, NF4 "
        "with double quantization. *Of limit* is the least time that the machine's measured "
        "bandwidth and FMA rate allow over ours; the last column is how many times faster ours is."
    )
    lines = [
        *textwrap.wrap(about, 108),
        "",
        "| work | ours | of limit | ours against |",
        "|---|---:|---:|---|",
        *_op_rows(report, isa),
    ]
    if step := record.data(report, "Training step"):
        lines += ["", *textwrap.wrap(_step_line(step), 108)]
    if perplexity := record.data(report, "Held-out perplexity"):
        lines += ["", _perplexity_line(perplexity)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    report = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    written = MARKERS.sub(lambda _: render(report), text)
    if args.check:
        raise SystemExit(written != text and "README.md differs from docs/benchmarks.json")
    readme.write_text(written)


if __name__ == "__main__":
    main()
