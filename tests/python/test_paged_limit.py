"""State four times as large as the memory allowed: the plain optimizer fails, the paged one trains.

RLIMIT_DATA bounds what a process has of private memory; a mapped file is not of it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import hashlib, resource, sys
import torch
from torch import nn
from qlora_native import optim

VALUES, TENSORS = 4 << 20, 4
STATE = 8 * VALUES * TENSORS

def parameters():
    return [nn.Parameter(torch.ones(VALUES, dtype=torch.bfloat16)) for _ in range(TENSORS)]

def train(optimizer, params):
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for p in params:
            p.grad.normal_(generator=generator)
        optimizer.step()

def digest(params):
    whole = hashlib.sha256()
    for p in params:
        whole.update(p.detach().view(torch.uint8).numpy())
    return whole.hexdigest()

def small_step():  # what is allocated once: threads, tables
    params = [nn.Parameter(torch.ones(VALUES // 64, dtype=torch.bfloat16))]
    params[0].grad = torch.ones_like(params[0])
    optim.AdamW(params).step()

params = parameters()
for p in params:
    p.grad = torch.empty_like(p)
small_step()
if sys.argv[1] == "unlimited":
    train(optim.AdamW(params), params)
    print(digest(params))
    sys.exit()

with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) for line in status if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + STATE // 4, resource.RLIM_INFINITY))
try:
    train(optim.AdamW(params), params)
except RuntimeError as error:
    print("failed:", str(error).splitlines()[0])
print(all(bool((p == 1).all()) for p in params))
train(optim.PagedAdamW(params, paging_directory="/var/tmp"), params)
print(digest(params))
"""


def run(mode: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
def test_state_four_times_what_is_allowed() -> None:
    (wanted,) = run("unlimited")
    failure, untouched, digest = run("limited")
    assert failure.startswith("failed: ") and "allocate" in failure
    assert untouched == "True"  # no state, no step
    assert digest == wanted
