"""The environment of a process: versions, devices, the command, the git revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "xsmae", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
    "pillow",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions, devices, the command and the git revision of the working folder."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None  # such as xsmae itself, run from its folder
    return {
        "schema": 1,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "command": sys.argv,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    """The git revision of the checkout with this package, None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
