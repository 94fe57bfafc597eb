"""OpenMP's workers: a thread that has computed can end its own."""

import subprocess
import sys

import pytest
import torch  # noqa: F401 - its library is looked for

from medusa.kernels import workers

CODE = """
import os, time, torch
from medusa.kernels.workers import release_workers

def threads():
    return len(os.listdir("/proc/self/task"))

def add():
    torch.ones(1 << 20) + 1

torch.set_num_threads(3)
add()
busy = threads()
release_workers()
for _ in range(500):
    if threads() == busy - 2:
        break
    time.sleep(0.01)
else:
    raise SystemExit(f"{threads()} of {busy} threads are left")
add()
assert threads() == busy
"""


@pytest.mark.skipif(workers._openmp() is None, reason="torch computes without GNU's OpenMP")
def test_workers_end_and_come_again():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
