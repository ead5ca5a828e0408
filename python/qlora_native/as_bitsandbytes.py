"""Runs an unmodified program with qlora_native in bitsandbytes' place.

python -m qlora_native.as_bitsandbytes script.py args…
python -m qlora_native.as_bitsandbytes -m package.module args…
accelerate launch -m qlora_native.as_bitsandbytes script.py args…
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from qlora_native.standin import install_as_bitsandbytes

_USAGE = "usage: python -m qlora_native.as_bitsandbytes [-m MODULE | SCRIPT] ARGS…"


def main(arguments: list[str]) -> None:
    """Run the script, or the module after -m, as `python` itself would."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    is_module = arguments[:1] == ["-m"]
    program = arguments[1:] if is_module else arguments
    if not program or program[0].startswith("-"):
        raise SystemExit(_USAGE)
    if not is_module and not Path(program[0]).exists():
        raise SystemExit(f"no script at {program[0]}\n{_USAGE}")
    install_as_bitsandbytes()
    sys.argv = program
    if is_module:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).resolve().parent)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
