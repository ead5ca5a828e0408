"""Stage: the compiler's word on what the build stage made for this card: bench/machine_code.py.

Spills, stack and waits come from the compiler's report in that stage's log, registers and machine
code from the library itself, by cuobjdump and nvdisasm where they are. The emulator runs the host's
code: there is none of a card's to read.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import machine_code
from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.build import architecture
from bench.gpu_acceptance.setting import Setting

TOOLS = ("cuobjdump", "nvdisasm")
LIBRARY = "libqlora_native.so"


def reported(log: Path, target: str) -> dict[str, Any]:
    """From the build's log; it says nothing of a unit that had been compiled before."""
    text = log.read_text(errors="replace") if log.exists() else ""
    kernels = machine_code.of_ptxas(text)
    return {
        "kernels": len(kernels),
        "faults": machine_code.faults_of_report(text)
        + machine_code.faults_of_resources(kernels, target),
    }


def _summary(
    resources: list[machine_code.Resources], code: list[machine_code.Code], target: str
) -> list[dict[str, Any]]:
    """A row a kernel: of its instances, the most registers, and the instructions it must have."""
    instances = Counter(kernel.kernel for kernel in resources)
    listed = machine_code.instructions_of(target)
    return [
        {
            "kernel": name,
            "instances": count,
            "registers": max(r.registers for r in resources if r.kernel == name),
            "instructions": [
                one for one in listed.get(name, ())
                if all(one in c.instructions for c in code if c.kernel == name)
            ],
        }
        for name, count in sorted(instances.items())
    ]  # fmt: skip


def _one(
    cubin: Path, tools: dict[str, str]
) -> tuple[list[machine_code.Resources], list[machine_code.Code]]:
    command = [tools["cuobjdump"], "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = machine_code.disassembled(cubin, tools["nvdisasm"])
    return machine_code.of_cuobjdump(usage), code


def disassembled(library: Path, target: str, folder: Path, tools: dict[str, str]) -> dict[str, Any]:
    """What is in the library for this card."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.cubin"):
        old.unlink()
    of_card = ["--gpu-architecture", f"sm_{target}"]
    extract = [tools["cuobjdump"], *of_card, "--extract-elf", "all", library]
    subprocess.run(extract, cwd=folder, check=True)
    with ThreadPoolExecutor() as pool:  # each is a process of its own
        read = list(pool.map(lambda cubin: _one(cubin, tools), sorted(folder.glob("*.cubin"))))
    resources = [kernel for kernels, _ in read for kernel in kernels]
    code = [kernel for _, kernels in read for kernel in kernels]
    faults = machine_code.faults_of_resources(resources, target)
    faults += machine_code.faults_of_code(code, target)
    if Counter(r.kernel for r in resources) != Counter(c.kernel for c in code):
        faults.append("the two tools name different kernels, or not all was inlined into one")
    there = {kernel.kernel for kernel in code}
    absent = sorted(machine_code.instructions_of(target).keys() - there)
    faults += [f"{name} is not in {library.name} for sm_{target}" for name in absent]
    return {"kernels": _summary(resources, code, target), "faults": faults}


def read(setting: Setting, target: str) -> dict[str, Any]:
    result: dict[str, Any] = {"architecture": f"sm_{target}"}
    result["report"] = reported(setting.folder / "build.log", target)
    found = {name: machine_code.tool(name) for name in TOOLS}
    tools = {name: path for name, path in found.items() if path is not None}
    result["not_here"] = [name for name in TOOLS if name not in tools]
    if not result["not_here"]:
        library = setting.site / "qlora_native" / LIBRARY
        result["code"] = disassembled(library, target, setting.folder / "cubins", tools)
    return result


def main() -> None:
    setting = settings.of_stage(__doc__)
    if setting.emulate:
        result: dict[str, Any] = {"not_here": ["machine code: the emulator runs the host's"]}
    else:
        result = read(setting, architecture())
    settings.write_result(setting, "sass", result)
    parts = (result.get(part, {}) for part in ("report", "code"))
    raise SystemExit(any(part.get("faults") for part in parts))


if __name__ == "__main__":
    main()
