"""Kept memory changes the time of a step, not its result."""

import subprocess
import sys

import pytest

from hcl import memory

CODE = """
import resource, torch
from hcl import memory
torch.set_num_threads(1)
kept = {keep} and memory.keep()
x = torch.ones(1 << 24)  # 64 MB: above 32, glibc always returns it to the kernel
for _ in range(5):
    x = torch.relu(x + 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    x = torch.relu(x + 1.0)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, x[0].item())
"""


def run(keep):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True
    )
    kept, faults, value = done.stdout.split()
    return kept == "True", int(faults), value


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_process_that_keeps_its_memory_has_few_page_faults():
    kept, faults, value = run(keep=True)
    if not kept:
        pytest.skip("no glibc")
    _, usual, same = run(keep=False)
    assert value == same
    assert faults < usual / 2


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep.__wrapped__() is False
