"""Stage: builds the package for this card alone; nothing is downloaded or installed elsewhere.

On the emulator the build that is already there is taken, where it emulates.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import torch

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.setting import ROOT, Setting

# Those whose newest instructions need a target of their own.
_SPECIFIC = {(9, 0): "90a", (10, 0): "100a", (12, 0): "120a"}


def architecture() -> str:
    capability = torch.cuda.get_device_capability()
    return _SPECIFIC.get(capability, "{}{}".format(*capability))


def options(setting: Setting) -> list[str]:
    if setting.emulate:
        return ["-DQLORA_CUDA=OFF", "-DQLORA_EMULATION=ON"]
    # What the compiler says of each kernel lands in the stage's log, where `sass` reads it.
    report = "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"
    return ["-DQLORA_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}-real", report]


def emulator_is_there() -> bool:
    return (
        importlib.util.find_spec("qlora_native") is not None
        and importlib.util.find_spec("qlora_native._emulation") is not None
    )


def build(setting: Setting) -> None:
    native = setting.folder / "native"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        "cmake", "-S", ROOT, "-B", native, *generator, *options(setting),
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={setting.site}",
    ]  # fmt: skip
    subprocess.run(configure, check=True)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", native, "--parallel", jobs], check=True)
    sources = ROOT / "python" / "qlora_native"
    shutil.copytree(
        sources, setting.site / "qlora_native", dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )  # fmt: skip
    subprocess.run(["cmake", "--install", native], check=True)


def main() -> None:
    setting = settings.of_stage(__doc__)
    here = setting.emulate and emulator_is_there()
    if not here:
        build(setting)
    target = "host, emulated" if setting.emulate else f"sm_{architecture()}"
    settings.write_result(setting, "build", {"target": target, "was_there": here})


if __name__ == "__main__":
    main()
