"""One wheel for every torch from 2.10 on: built once here, then run under two versions of torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# Another torch that pip can install beside this one. It is fetched once, into a folder that `make
# clean` removes; only torch and what it needs come from there, all else from this environment.
OTHER_TORCH = os.environ.get("QLORA_ABI_TORCH", "2.14.1")
CACHE = Path(os.environ.get("QLORA_ABI_CACHE", ROOT / "build" / "abi"))

# With the default instruction set alone: the others do not differ in what they ask of torch.
OP_TESTS = [
    "test_opcheck.py",
    "test_errors.py",
    "test_autograd.py",
    "test_quantize.py",
    "test_dequantize.py",
    "test_scales.py",
    "test_linear.py",
    "test_qlora_linear.py",
    "test_adamw.py",
]


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (path,) = folder.glob("qlora_native-*.whl")
    return path


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


@pytest.fixture(scope="session")
def other_torch() -> Path:
    folder = CACHE / f"torch-{OTHER_TORCH}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip("install", "--no-compile", "--target", str(folder), f"torch=={OTHER_TORCH}")
        (folder / "complete").touch()
    return folder


def run_op_tests(*python_path: Path) -> str:
    tests = [path for name in OP_TESTS if (path := ROOT / "tests/python" / name).exists()]
    assert len(tests) >= 3
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
            "-m", "not slow", *map(str, tests),
        ],
        capture_output=True,
        text=True,
        cwd=python_path[-1],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, python_path)),
            "QLORA_TEST_ISAS": "default",
        },
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-8000:]
    assert re.search(r"\d+ passed", output), output[-2000:]
    return output


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("__init__.py", "py.typed", "_core.pyi", "libqlora_native.so"):
        assert f"qlora_native/{wanted}" in names
    assert any(re.fullmatch(r"qlora_native/_core\..*\.so", name) for name in names)
    assert not [name for name in names if name.startswith(("tests/", "bench/", "cpp/"))]


def test_the_wheel_needs_no_torch_newer_than_it_says(site: Path) -> None:
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.exists():
        pytest.skip("torch-abi-audit is not installed")
    library = site / "qlora_native" / "libqlora_native.so"
    result = subprocess.run(
        [audit, "--json", "--check", "torch", library], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.dumps(json.loads(result.stdout))
    assert '"2.10.0"' in report
    assert not re.search(r'"2\.1[1-9]', report), report


def test_the_wheel_keeps_no_path_of_the_machine_that_built_it(site: Path) -> None:
    for library in (site / "qlora_native").glob("*.so"):
        dynamic = subprocess.run(
            ["readelf", "-d", library], capture_output=True, text=True, check=True
        ).stdout
        paths = re.findall(r"(?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
        assert paths in ([], ["$ORIGIN"]), library.name
        assert str(ROOT).encode() not in library.read_bytes(), library.name


@pytest.mark.abi
def test_op_tests_pass_under_this_torch(site: Path) -> None:
    output = run_op_tests(site)
    assert f"torch {torch.__version__}" in output
    assert str(site) in output


@pytest.mark.abi
def test_op_tests_pass_under_another_torch(site: Path, other_torch: Path) -> None:
    output = run_op_tests(other_torch, site)
    assert re.search(rf"torch {re.escape(OTHER_TORCH)}\b", output)
    assert str(site) in output


CUDA_PROBE = """
import torch, qlora_native
from qlora_native import ops
from torch._subclasses.fake_tensor import FakeTensorMode
if torch.version.cuda is None: raise SystemExit("skip: this torch is no CUDA build")
if "cuda_architectures" not in qlora_native.build_info(): raise SystemExit("skip: no CUDA in wheel")
assert torch._C._dispatch_has_kernel_for_dispatch_key("qlora_native::qlora_linear", "CUDA")
with FakeTensorMode():
    x = torch.empty(3, 64, device="cuda")
    packed = torch.empty(32 * 32, 1, device="cuda", dtype=torch.uint8)
    y = ops.linear_4bit(x, packed, torch.empty(32, device="cuda"), None, None, 32)
assert y.device.type == "cuda" and y.shape == (3, 32)
if not torch.cuda.is_available():
    try: torch.empty(1, device="cuda")
    except RuntimeError as error: assert "NVIDIA" in str(error), error
"""


@pytest.mark.abi
def test_a_cuda_build_of_torch_knows_the_ops(site: Path, other_torch: Path) -> None:
    """Registered, with fakes; where there is no GPU, torch says so."""
    path = os.pathsep.join(map(str, (other_torch, site)))
    result = subprocess.run(
        [sys.executable, "-c", CUDA_PROBE],
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
    )
    if result.stderr.startswith("skip: "):
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
