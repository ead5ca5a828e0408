"""The house rules about who may know whom, read from the sources.

cli, train -> model, nn, optim -> functional -> autograd -> ops -> [dispatcher]
-> cpp/torch -> contract <- cpu, cuda, emulation
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "cpp"
PACKAGE = ROOT / "python" / "qlora_native"

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
INTRINSIC = re.compile(
    r"\b_mm(?:\d+)?_\w+\s*\(|\b__m(?:128|256|512)\w*\b|\b__mmask\d+\b"
    r"|\bv\w+_(?:n_)?[bfpsu]\w*\d+\s*\(|\b(?:float|bfloat|u?int|poly)\d+x\d+(?:x\d)?_t\b"
)


def sources(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes)


def includes(path: Path) -> set[str]:
    return set(INCLUDE.findall(path.read_text()))


def relative(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


CPP_SOURCES = sources(CPP, ".h", ".cpp")


def test_sources_are_found() -> None:
    assert len(CPP_SOURCES) > 20


def test_torch_stands_only_in_cpp_torch() -> None:
    assert not relative(
        [
            path
            for path in CPP_SOURCES
            if any(i.startswith(("torch/", "ATen/", "c10/")) for i in includes(path))
            and path.parent != CPP / "torch"
        ]
    )


def test_torch_headers_are_the_stable_ones() -> None:
    stable = ("torch/csrc/stable/", "torch/headeronly/")
    found = {i for path in CPP_SOURCES for i in includes(path) if i.startswith("torch/")}
    assert all(i.startswith(stable) for i in found), found
    assert {p.name for p in CPP_SOURCES if any("torch/csrc" in i for i in includes(p))} == {
        "stable.h"
    }


def test_python_stands_only_in_cpp_python() -> None:
    assert not relative(
        [
            path
            for path in CPP_SOURCES
            if any(i.startswith(("pybind11/", "Python.h")) for i in includes(path))
            and path.parent != CPP / "python"
        ]
    )


def test_the_contract_knows_neither_backend_nor_torch() -> None:
    for path in sources(CPP / "include", ".h"):
        for include in includes(path):
            assert include.startswith("qlora_native/") or "/" not in include, (path, include)


def test_the_cpu_backend_knows_only_the_contract() -> None:
    for path in sources(CPP / "cpu", ".h", ".cpp"):
        for include in includes(path):
            system = include.startswith(("sys/", "linux/"))
            assert include.startswith("qlora_native/") or "/" not in include or system, include


def test_the_op_files_know_no_device() -> None:
    for path in (CPP / "torch").glob("ops_*.cpp"):
        text = path.read_text()
        assert not re.search(r"is_cpu|is_cuda|cpu::|cuda::|isa\.h", text), path.name


def test_intrinsics_stand_only_in_the_simd_vocabularies() -> None:
    offenders = []
    for path in CPP_SOURCES:
        if path.name.startswith("simd_") and path.parent == CPP / "cpu":
            continue
        code = re.sub(r"//.*", "", path.read_text())
        if INTRINSIC.search(code) or "immintrin.h" in code or "arm_neon.h" in code:
            offenders.append(path)
    assert not relative(offenders)


# ---- CUDA ----------------------------------------------------------------------------------------

CUDA = ROOT / "cuda"
CUDA_SOURCES = sources(CUDA, ".h", ".cuh", ".cu")
# Launches, PTX, intrinsics, the runtime, raw shared memory: the words of cuda/device.
DEVICE_WORD = re.compile(
    r"<<<|\basm\b|\b__(?:shfl|ballot|any|syncthreads|syncwarp|ldg)\w*|\bcuda[A-Z]\w*\s*\(|"
    r"extern\s+__shared__|\b(?:threadIdx|blockIdx|blockDim|gridDim)\b"
)


def test_the_cuda_backend_knows_only_the_contract() -> None:
    ours = ("qlora_native/", "device/", "kernels/", "launch/", "paging/", "backend.h")
    toolkit = {"cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"}
    assert len(CUDA_SOURCES) > 20
    for path in CUDA_SOURCES:
        allowed = toolkit if path.parent == CUDA / "device" else set()
        for include in includes(path) - allowed:
            assert include.startswith(ours) or re.fullmatch(r"[a-z_]+", include), (path, include)


def test_only_cuda_device_speaks_to_the_hardware() -> None:
    assert not relative(
        [
            path
            for path in CUDA_SOURCES
            if path.parent != CUDA / "device"
            and DEVICE_WORD.search(re.sub(r"//.*", "", path.read_text()))
        ]
    )


def test_every_device_header_has_a_twin() -> None:
    twins = ROOT / "tests" / "emulation" / "device"
    assert {p.name for p in (CUDA / "device").iterdir()} == {p.name for p in twins.iterdir()}


# What the isa_*.cpp files include is compiled with -m flags: a std:: container or algorithm there
# could leave a copy of itself that the linker picks for everybody.
FORBIDDEN_STD = {
    "algorithm", "any", "array", "deque", "functional", "iostream", "list", "map", "memory",
    "mutex", "numeric", "optional", "queue", "ranges", "set", "span", "sstream", "string",
    "string_view", "thread", "tuple", "unordered_map", "utility", "variant", "vector",
}  # fmt: skip


def reachable(path: Path) -> set[Path]:
    found: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        for include in includes(current):
            for folder in (current.parent, CPP / "include"):
                target = folder / include
                if target.is_file() and target not in found:
                    found.add(target)
                    todo.append(target)
    return found


@pytest.mark.parametrize("unit", sorted((CPP / "cpu").glob("isa_*.cpp")), ids=lambda p: p.stem)
def test_isa_files_include_no_std_container(unit: Path) -> None:
    for path in reachable(unit):
        # format.h compares names by string_view, in a constexpr that no kernel calls.
        allowed = {"string_view"} if path.name == "format.h" else set()
        assert not includes(path) & FORBIDDEN_STD - allowed, path.name


# Lower may not import higher; modules of one level may import each other. What is not named here
# stands between the layers and the command line: it may import all but the latter.
LEVELS = [
    {"_load", "_errors", "_core", "reference"},
    {"ops", "_fake", "_inplace", "_autocast", "_vmap"},
    {"autograd"},
    {"quant_state", "bnb_keys", "functional", "requantize"},
    {"linear", "lora", "experts", "nn", "optim", "paging"},
    {"anything else"},
    {"cli", "demo"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def level_of(module: str) -> int:
    return LEVEL_OF.get(module, LEVEL_OF["anything else"])


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """The dotted names of the modules that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_python_modules_import_downwards() -> None:
    offenders = []
    for path in sources(PACKAGE, ".py"):
        module = module_of(path)
        if module == "__init__":
            continue
        for name in imports(ast.walk(ast.parse(path.read_text()))):
            package, _, rest = name.partition(".")
            imported = rest.partition(".")[0]
            is_module = (PACKAGE / f"{imported}.py").is_file() or (PACKAGE / imported).is_dir()
            upwards = level_of(imported) > level_of(module)
            if package == "qlora_native" and imported and is_module and upwards:
                offenders.append(f"{module} imports {imported}")
    assert not offenders


def test_optional_packages_are_imported_late() -> None:
    optional = {"transformers", "peft", "bitsandbytes", "gguf", "matplotlib", "yaml"}
    for path in sources(PACKAGE, ".py"):
        if module_of(path) in {"cli", "demo", "integrations"}:
            continue
        at_import = imports(ast.parse(path.read_text()).body)
        assert not optional & {name.partition(".")[0] for name in at_import}, path.name
