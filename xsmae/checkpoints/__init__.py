"""Checkpoints with digests that detect damage."""

from xsmae.checkpoints.store import Checkpoints

__all__ = ["Checkpoints"]
