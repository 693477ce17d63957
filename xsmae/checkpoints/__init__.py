"""Checkpoints that are whole, or noticed not to be."""

from xsmae.checkpoints.store import Checkpoints

__all__ = ["Checkpoints"]
