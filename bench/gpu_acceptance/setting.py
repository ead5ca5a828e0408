"""What every stage is told: where to work, on what, and how large."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATED = "cuda-emulated"
GPU = "cuda"


@dataclass(frozen=True)
class Setting:
    folder: Path
    emulate: bool
    bitsandbytes: Path | None  # a wheel
    oversubscribe: bool = False  # managed memory beyond what the card has free

    @property
    def backend(self) -> str:
        return EMULATED if self.emulate else GPU

    @property
    def device(self) -> torch.device:
        """Of the tensors that a stage makes; the emulator serves those of the CPU."""
        return torch.device("cpu" if self.emulate else GPU)

    @property
    def site(self) -> Path:
        """The package as the build stage leaves it."""
        return self.folder / "site"

    def result(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"

    def environment(self) -> dict[str, str]:
        """Of the stages' processes: this build, the peer, and the repository for `bench`."""
        paths = [self.folder / "peer", ROOT, Path(os.environ.get("PYTHONPATH", ""))]
        if (self.site / "qlora_native").exists():
            paths.insert(0, self.site)
        # bitsandbytes looks for a kernel of its CPU's on the Hub when it is imported.
        offline = {"HF_HUB_OFFLINE": "1"}
        return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def arguments(self) -> list[str]:
        flags = {"--emulate": self.emulate, "--oversubscribe": self.oversubscribe}
        return ["--out", str(self.folder), *(flag for flag, on in flags.items() if on)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_acceptance")
    parser.add_argument("--emulate", action="store_true", help="on the emulator, with small sizes")
    parser.add_argument("--bitsandbytes", type=Path, help="its wheel, to compare with")
    parser.add_argument(
        "--oversubscribe", action="store_true",
        help="stage paging: ask for more managed memory than is free, on a machine of your own",
    )  # fmt: skip


def of_arguments(args: argparse.Namespace) -> Setting:
    return Setting(args.out.resolve(), args.emulate, args.bitsandbytes, args.oversubscribe)


def of_stage(description: str | None) -> Setting:
    """In a stage's own process."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    return of_arguments(parser.parse_args())


def serve_by_cuda(setting: Setting) -> None:
    """From now on the CUDA backend answers for setting.device: on the emulator, for the CPU."""
    if setting.emulate:
        from qlora_native import _emulation

        _emulation.use(True)


def write_result(setting: Setting, stage: str, result: dict[str, Any]) -> None:
    """Atomically, and after every row: what a stage had when its time was over is kept."""
    path = setting.result(stage)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(result, indent=1))
    fresh.replace(path)
