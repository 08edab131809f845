"""Relations of 1,024 embeddings of width 512 take far less than the N^3 of the obvious code."""

from __future__ import annotations

import subprocess
import sys

import pytest

N, WIDTH, LIMIT_MB = 1024, 512, 1024

SCRIPT = f"""
import pathlib, re, resource, sys, torch
from tutelage import losses

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start from the peak of the process that started this one
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)

torch.set_num_threads(1)
loss = getattr(losses, sys.argv[1])
student, teacher = torch.randn({N}, {WIDTH}, requires_grad=True), torch.randn({N}, {WIDTH})
loss(student[:8], teacher[:8]).backward()  # libraries load what they load once
before = peak()
loss(student, teacher).backward()
after = peak()
assert student.grad.isfinite().all()
control = torch.ones(1 << 28)
print(after - before, peak() - after)
"""


@pytest.mark.parametrize("name", ["rkd_angle", "rkd_distance", "similarity", "correlation", "pkt"])
def test_relations_of_a_thousand_embeddings_fit_in_a_gigabyte(name):
    done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    megabytes, control = map(float, done.stdout.split())
    assert control > 500, "a gigabyte more went unnoticed: the measurement does not measure"
    # angles of all triples are 4 GB in float32, differences of all pairs 2 GB
    assert megabytes < LIMIT_MB
    assert megabytes < 400, f"{name}: {megabytes:.0f} MB, much more than the [B, B] matrices it needs"
