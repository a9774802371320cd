import platform
import subprocess
import sys

import pytest

from fxq.runtime.memory import allocator

PEAK = """
import resource, torch
from fxq.runtime.memory.allocator import keep_memory
assert keep_memory() is True
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):  # until the free memory lies in one piece
    faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_not_faulted_again():
    # Process-wide and for good, so in a process of its own. 4 tensors of 64 MiB are 65536 pages.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("it was called"))
    assert allocator.keep_memory() is False
