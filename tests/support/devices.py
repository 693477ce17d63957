"""Modules of the tests, run on several devices of a CPU in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

# On all cores again, where the worker that starts it is on one of them: devices wait
# for each other in loops, and eight of them on one core take minutes.
CODE = """
import os, runpy, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count()))
runpy.run_module(sys.argv[1], run_name="__main__")
"""


def run_on_devices(module, devices, *arguments):
    """The JSON that `python -m module` prints last, on so many devices.

    The module finds the arguments in `sys.argv[2:]`.
    """
    done = subprocess.run(
        [sys.executable, "-c", CODE, module, *arguments],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # What is divided over devices, and how, is decided before LLVM, whose
            # optimising is half of the compiling.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0",
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
