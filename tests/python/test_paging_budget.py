"""device_budget="auto" under a control group: of both versions, on a system made of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_native import optim
from qlora_native.paging import budget
from qlora_native.paging.control_group import Allowance, memory_allowances

GB = 10**9
CPU = torch.device("cpu")


@dataclass
class System:
    """What stands in /proc and in the folders where control groups are mounted."""

    root: Path

    def machine(self, available: int, total: int) -> None:
        text = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB"
        (self.proc / "meminfo").write_text(text)

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    def process(self, groups: str, *mounts: str) -> None:
        """Lines of /proc/self/cgroup; "root mount-point type options" of each mount."""
        lines = []
        for n, mount in enumerate(mounts, start=30):
            inside, point, kind, options = mount.split()
            place = str(self.root / point).replace(" ", "\\040")
            lines.append(f"{n} 23 0:{n} {inside} {place} rw,relatime shared:9 - {kind} x {options}")
        (self.proc / "self" / "cgroup").write_text(groups)
        (self.proc / "self" / "mountinfo").write_text("\n".join(lines))

    def v1(self, folder: str, limit: int, used: int, files: int = 0) -> None:
        self._write(folder, {
            "memory.limit_in_bytes": limit,
            "memory.usage_in_bytes": used,
            "memory.stat": f"cache {files + 7}\nactive_file 1\ntotal_active_file {files}\n"
            "total_inactive_file 0\ntotal_unevictable 0",
        })  # fmt: skip

    def v2(self, folder: str, limit: int | str, used: int, files: int = 0) -> None:
        self._write(folder, {
            "memory.max": limit,
            "memory.current": used,
            "memory.stat": f"anon 5\nfile {files + 7}\nshmem 7\nactive_file {files}\n"
            "inactive_file 0",
        })  # fmt: skip

    def _write(self, folder: str, files: dict[str, int | str]) -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.root / folder / name).write_text(f"{text}\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """A machine of 80 GB, 40 of them available, whose processes are in no group."""
    made = System(tmp_path / "a system")
    (made.proc / "self").mkdir(parents=True)
    made.machine(40 * GB, 80 * GB)
    monkeypatch.setattr(budget, "_PROC", made.proc)
    return made


def auto() -> float:
    """GB of state that "auto" lets stay."""
    return budget.free_for_state(CPU, 0) / GB


V1 = ("8:cpu:/\n4:hugetlb,memory:{}\n0::/", "{} cg/memory cgroup rw,memory")
V2 = ("0::{}", "{} cg cgroup2 rw,nsdelegate")


def test_no_group(system: System) -> None:
    assert auto() == pytest.approx(40 - 80 / 8, abs=1e-5)
    assert memory_allowances(system.proc / "self") == []


@pytest.mark.parametrize(("version", "folder"), [(1, "cg/memory"), (2, "cg")])
@pytest.mark.parametrize(
    ("group", "root", "inside"),
    [
        ("/", "/", ""),  # in a container with a namespace of its own
        ("/user/run 1", "/", "user/run 1"),  # on the machine itself
        ("/docker/1", "/docker/1", ""),  # in a container without one
        ("/docker/1/sub", "/docker/1", "sub"),
        ("/docker/1", "/", ""),  # whose group is not to be seen
        ("/../beside", "/", ""),
    ],
)
def test_its_limit_counts(
    system: System, version: int, folder: str, group: str, root: str, inside: str
) -> None:
    groups, mount = V1 if version == 1 else V2
    system.process(groups.format(group), "/ other tmpfs rw", mount.format(root))
    write = system.v1 if version == 1 else system.v2
    write(f"{folder}/{inside}", 16 * GB, 9 * GB, 3 * GB)
    # 9 are in use, 3 of these for files' pages; an eighth of 16 is the reserve.
    assert auto() == pytest.approx(16 - 9 + 3 - 2)
    assert memory_allowances(system.proc / "self") == [Allowance(10 * GB, 16 * GB)]


def test_the_smaller_of_group_and_machine(system: System) -> None:
    system.process(V2[0].format("/"), V2[1].format("/"))
    system.v2("cg", 16 * GB, 1 * GB)
    assert auto() == pytest.approx(15 - 2)
    system.machine(5 * GB, 80 * GB)  # others on the machine have the rest
    assert auto() == pytest.approx(5 - 2, abs=1e-5)
    system.v2("cg", 16 * GB, 20 * GB)  # over it
    assert auto() == 0


def test_the_group_above_that_allows_less(system: System) -> None:
    system.process(V2[0].format("/pod/job"), V2[1].format("/"))
    system.v2("cg/pod", 8 * GB, 4 * GB)
    for limit in (32 * GB, "max"):
        system.v2("cg/pod/job", limit, 1 * GB)
        assert auto() == pytest.approx(4 - 1)
    (system.root / "cg/pod/job/memory.high").write_text("2000000000\n")  # where it is slowed down
    assert auto() == pytest.approx(1 - 0.25)


def test_both_versions_mounted(system: System) -> None:
    """As systemd has it: the controller is with one of them."""
    system.process(
        V1[0].format("/job"),
        "/ cg/unified cgroup2 rw", "/ cg/cpu cgroup rw,cpu", V1[1].format("/"),
    )  # fmt: skip
    system.v1("cg/memory", 2**63 - 4096, 30 * GB)  # no limit
    system.v1("cg/memory/job", 4 * GB, 1 * GB)
    assert auto() == pytest.approx(3 - 0.5)


def test_auto_follows_the_group(system: System) -> None:
    """State of 4.8 MB: leaves as the group's memory runs short, and comes back."""
    system.process(V2[0].format("/"), V2[1].format("/"))
    system.v2("cg", 80_000_000, 80_000_000)
    params = [nn.Parameter(torch.ones(200_000)) for _ in range(3)]
    optimizer = optim.PagedAdamW(params, paging_directory="/var/tmp", chunk_bytes=1 << 18)
    for p in params:
        p.grad = torch.ones_like(p)
    for used, wanted in ((80, 0), (10, 60_000_000), (69, 1_000_000)):
        system.v2("cg", 80_000_000, used * 1_000_000)
        before = optimizer.paging()["moved_out"]
        optimizer.step()
        paging = optimizer.paging()
        assert paging["budget"] == wanted
        assert (paging["moved_out"] > before) == (wanted < paging["bytes"])
