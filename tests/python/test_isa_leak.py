"""No AVX instruction may stand where a processor without AVX could come upon it.

Two ways lead there: an object compiled with the wrong flags, and an inline function that both an
isa_*.cpp object and another one carry, of which the linker keeps whichever copy it meets first.
Both are looked for in the build tree's objects, and the linked library is disassembled as well.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(
        platform.machine() not in {"x86_64", "AMD64"}, reason="not an x86-64 processor"
    ),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
]

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
# VEX and EVEX mnemonics begin with v, those of mask registers with k; verr and verw are old.
AVX = re.compile(r"^\s+[0-9a-f]+:\t(?:\{[^}]*\} )?(v(?!err|erw)[a-z0-9]+|k[a-z]+[bwdq])\b")


@dataclass
class Object:
    """An object file or a library: its functions, those with AVX in them, and the weak ones."""

    path: Path
    functions: set[str] = field(default_factory=set)
    avx: dict[str, str] = field(default_factory=dict)  # function -> one of its AVX instructions
    weak: set[str] = field(default_factory=set)

    @property
    def is_isa(self) -> bool:
        return re.match(r"isa_(?!scalar)\w+\.cpp", self.path.name) is not None


def tool(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_object(path: Path) -> Object:
    found = Object(path)
    function = "(no function)"
    for line in tool("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        if header := FUNCTION.match(line):
            function = header[1]
            found.functions.add(function)
        elif instruction := AVX.match(line):
            found.avx.setdefault(function, instruction[1])
    for line in tool("nm", "--defined-only", path).splitlines():
        _, kind, name = line.split(maxsplit=2)
        if kind in "WVu":
            found.weak.add(name)
    return found


def leaks_of(objects: list[Object]) -> list[str]:
    leaks = []
    for one in objects:
        for function, instruction in one.avx.items():
            if not one.is_isa:
                leaks.append(f"{one.path.name}: {function} has {instruction}")
            elif function in one.weak:
                shared = [o.path.name for o in objects if o is not one and function in o.functions]
                if shared:
                    leaks.append(f"{one.path.name}: weak {function}, also in {', '.join(shared)}")
    return leaks


def build_tree() -> Path:
    trees = [c.parent for c in (ROOT / "build").glob("**/CMakeCache.txt")]
    trees = [tree for tree in trees if (tree / "libqlora_native.so").exists()]
    if not trees:
        pytest.skip("no build tree under build/: configure and build, or pip install .")
    return max(trees, key=lambda tree: (tree / "libqlora_native.so").stat().st_mtime)


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    paths = sorted(build_tree().glob("CMakeFiles/*.dir/cpp/**/*.o"))
    assert len(paths) > 8
    return [read_object(path) for path in paths]


def test_only_the_isa_objects_hold_avx(objects: list[Object]) -> None:
    assert {o.path.name for o in objects if o.avx} == {
        "isa_avx2.cpp.o", "isa_avx512.cpp.o", "isa_avx512bf16.cpp.o",
    }  # fmt: skip
    assert leaks_of(objects) == []


def test_the_library_holds_avx_only_in_their_functions(objects: list[Object]) -> None:
    allowed = {function for one in objects if one.is_isa for function in one.functions}
    for name in ("libqlora_native.so", "_core*.so"):
        (path,) = build_tree().glob(name)
        library = read_object(path)
        assert set(library.avx) <= allowed


def compile_object(source: str, path: Path, *flags: str) -> Object:
    path.with_suffix("").write_text(source)
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tool(compiler, "-std=c++20", "-O2", *flags, "-c", path.with_suffix(""), "-o", path)
    return read_object(path)


def unit(name: str) -> str:
    """A source file with an inline function of its own, and one that calls it."""
    return f"""
[[gnu::noinline]] inline float sum(const float* x, int n) {{
  float s = 0;
  for (int i = 0; i < n; ++i) s += x[i];
  return s;
}}
float {name}(const float* x) {{ return sum(x, 8); }}
"""


def test_a_planted_flag_is_found(tmp_path: Path) -> None:
    planted = compile_object(unit("total"), tmp_path / "checks.cpp.o", "-mavx2")
    assert any("checks.cpp.o" in leak for leak in leaks_of([planted]))


def test_a_planted_shared_inline_function_is_found(tmp_path: Path) -> None:
    objects = [
        compile_object(unit("narrow"), tmp_path / "backend.cpp.o"),
        compile_object(unit("wide"), tmp_path / "isa_avx2.cpp.o", "-mavx2"),
    ]
    (leak,) = leaks_of(objects)
    assert leak.startswith("isa_avx2.cpp.o: weak _Z3sumPKfi, also in backend.cpp.o")
