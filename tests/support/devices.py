"""Runs modules of the tests in separate processes with several CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import FAST

# Use all cores again, even if the test worker is pinned to one. Devices wait for each
# other in loops, and eight of them on one core take minutes.
CODE = """
import os, runpy, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count()))
runpy.run_module(sys.argv[1], run_name="__main__")
"""


def run_on_devices(module, devices, *arguments):
    """Runs `python -m module` on `devices` devices; returns the JSON of its last line.

    The module gets the arguments in `sys.argv[2:]`.
    """
    done = subprocess.run(
        [sys.executable, "-c", CODE, module, *arguments],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Sharding is decided before what these flags change.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST}",
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
