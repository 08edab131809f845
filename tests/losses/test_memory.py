"""Relations of 640 embeddings of width 512 take far less than the N^3 of the obvious code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import python

N, WIDTH, LIMIT_MB = 640, 512, 1024

SCRIPT = f"""
import json, pathlib, re, sys, torch
from tutelage import losses

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
more = {{}}
for name in sys.argv[1:]:
    loss = getattr(losses, name)
    student, teacher = torch.randn({N}, {WIDTH}, requires_grad=True), torch.randn({N}, {WIDTH})
    loss(student[:8], teacher[:8]).backward()  # libraries load what they load once
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak()
    loss(student, teacher).backward()
    more[name] = peak() - before
    assert student.grad.isfinite().all(), name
before = peak()
control = torch.ones(1 << 28)
print(json.dumps(more), peak() - before, sep="\\n")
"""
NAMES = ["rkd_angle", "rkd_distance", "similarity", "correlation", "pkt"]


def test_relations_of_many_embeddings_fit_in_memory():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the largest resident size is read from /proc")
    done = python.run(["-c", SCRIPT, *NAMES])
    assert done.returncode == 0, done.stderr
    found, control = map(json.loads, done.stdout.splitlines())
    assert control > 500, "a gigabyte more went unnoticed: the measurement does not measure"
    assert found.keys() == set(NAMES)
    for name, megabytes in found.items():
        # angles of all triples are 1 GB in float32, differences of all pairs 0.8 GB
        assert megabytes < LIMIT_MB, name
        assert megabytes < 400, f"{name}: {megabytes:.0f} MB, much more than the [B, B] matrices it needs"
