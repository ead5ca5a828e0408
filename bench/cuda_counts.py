"""Counts what the CUDA kernels move on the emulator, and writes docs/cuda_counts.md.

python -m bench.cuda_counts              # needs a build with QLORA_EMULATION=ON
python -m bench.cuda_counts --check      # exit 1 where the document says something else
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.cuda_cases import BYTES_BAR, CASES, Case
from bench.gpu_model import CARDS, Card, predict

DOCUMENT = Path(__file__).parent.parent / "docs" / "cuda_counts.md"
MISSED = "✗"
Counts = Mapping[str, int]

HEAD = f"""\
# What the CUDA kernels move, by count

Written by `python -m bench.cuda_counts`, from the emulator's counters (`emulation.md`); the tests
hold the same cases (`bench/cuda_cases.py`) to their bars. These are counts of what is asked of
memory, caches or not: **no GPU has run them.**

*Least* is the bytes that have to cross the bus. *Moved* counts 32-byte sectors, distinct within a
warp's instruction, over the least: the bar is {BYTES_BAR}. *Used* is the bytes that threads asked
for over those of their sectors (above 1: lanes share them). *Passes* go over the banks of shared
memory; *conflicts* are those beyond what an access's width asks for: the bar is 0. {MISSED} marks a
bar that is missed, and the notes below say why; the list of cases says how far each may miss it.

| kernel | case | least | moved | used | global instr. | shared instr. | passes | conflicts |
|---|---|---:|---:|---:|---:|---:|---:|---:|
"""

PREDICTION = """\
## Prediction: no GPU has run it

Of these counts `bench/gpu_model.py` makes a time for each card: memory's bytes, flops of
`mma.sync` and `wgmma`, issue slots, passes over shared memory (`wgmma`'s operands, too), each over
its published rate; the longest is the limiter, and the others are taken to hide behind it. A cell
has that limiter (none: a card that the kernel is not for) and the fraction of the limit that it
leaves: the least bytes at memory's rate or the products at the tensor cores', whichever is longer,
over the predicted time.

**What is missing makes it too good**: latency, launches and tails, and the issue slots of integer,
address and conversion arithmetic, which the emulator does not count. One thing makes it too bad: an
access of 16 bytes a lane is taken for four passes even where lanes share words, which a GPU may
merge; `linear_fma` is made of such accesses.
The cases are small, so setting up tables weighs more than it does in a model's layer.

"""


def count(case: Case) -> Counts:
    """One call on the emulator; its data are made by the CPU backend."""
    from qlora_native import _emulation as emulation

    torch.manual_seed(0)
    call = case.make()
    emulation.use(True)
    emulation.set_seed(0)
    emulation.set_architecture(case.architecture)
    try:
        for direction, way in case.ways.items():
            emulation.force_way(direction, way)
        emulation.count(True)
        call()
        return dict(emulation.counts())
    finally:
        emulation.count(False)
        for direction in case.ways:
            emulation.force_way(direction, None)
        emulation.set_architecture(80)
        emulation.use(False)


def moved_bytes(counts: Counts) -> int:
    return 32 * (counts["loaded_sectors"] + counts["stored_sectors"])


def _marked(text: str, misses: bool) -> str:
    return f"{text} {MISSED}" if misses else text


def misses(case: Case, counts: Counts) -> bool:
    return moved_bytes(counts) > BYTES_BAR * case.least or counts["bank_conflicts"] > 0


def row(case: Case, counts: Counts) -> str:
    moved = moved_bytes(counts)
    used = (counts["loaded_bytes"] + counts["stored_bytes"]) / moved
    conflicts = counts["bank_conflicts"]
    cells = [
        f"`{case.kernel}`",
        case.what,
        f"{case.least / 1000:,.0f} kB",
        _marked(f"{moved / case.least:.3f}", moved > BYTES_BAR * case.least),
        f"{used:.2f}",
        f"{counts['global_instructions']:,}",
        f"{counts['shared_instructions']:,}",
        f"{counts['shared_passes']:,}",
        _marked(f"{conflicts:,}", conflicts > 0),
    ]
    return f"| {' | '.join(cells)} |"


def note(case: Case) -> str:
    return f"- `{case.kernel}`, {case.what}: {case.why}."


def prediction_head() -> str:
    names = " | ".join(card.name for card in CARDS)
    return f"| kernel | case | {names} |\n{'|---' * (2 + len(CARDS))}|"


def prediction_row(case: Case, counts: Counts) -> str:
    def cell(card: Card) -> str:
        if not card.runs(case):
            return "-"
        prediction = predict(case, counts, card)
        return f"{prediction.of_limit:.0%} {prediction.limiter}"

    cells = " | ".join(map(cell, CARDS))
    return f"| `{case.kernel}` | {case.what} | {cells} |"


def rates() -> str:
    lines = [
        f"- {card.name}: {card.bytes_per_second / 1e12:.3g} TB/s, "
        f"{card.tensor_flops / 1e12:.0f} TFLOP/s (bf16, dense), {card.multiprocessors} "
        f"multiprocessors at {card.clock / 1e9:.2f} GHz ({card.source})."
        for card in CARDS
    ]
    return "\n".join(["Rates:", "", *lines])


def render(counted: Sequence[tuple[Case, Counts]]) -> str:
    rows = "\n".join(row(case, counts) for case, counts in counted)
    notes = "\n".join(note(case) for case, counts in counted if misses(case, counts))
    predictions = "\n".join(prediction_row(case, counts) for case, counts in counted)
    return (
        f"{HEAD}{rows}\n\nWhere a bar is missed:\n\n{notes}\n\n"
        f"{PREDICTION}{prediction_head()}\n{predictions}\n\n{rates()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = render([(case, count(case)) for case in CASES])
    if args.check:
        raise SystemExit(text != DOCUMENT.read_text() and f"{DOCUMENT.name} is out of date")
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
