"""Stage: the op tests, the same files, with each op's tensors on the device."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.setting import ROOT

# Of the tests that take minutes on the emulator, these show the script.
_FEW = "reads_views or of_nothing or every_small_m or odd_k"


def main() -> None:
    setting = settings.of_stage(__doc__)
    report = setting.folder / "tests.xml"
    chosen = f"{setting.backend} and ({_FEW})" if setting.emulate else setting.backend
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "emulated",
        "-k", chosen, f"--junitxml={report}", "tests/python",
    ]  # fmt: skip
    environment = {**setting.environment(), "QLORA_TEST_ISAS": setting.backend}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    settings.write_result(setting, "tests", {"counts": counts, "failed": failed})
    raise SystemExit(code)


if __name__ == "__main__":
    main()
