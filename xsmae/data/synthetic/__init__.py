"""The built-in world: synthetic scenes of ten kinds of land, at any GSD."""

from xsmae.data.synthetic.source import CLASS_NAMES, Scene, SyntheticSource

__all__ = ["CLASS_NAMES", "Scene", "SyntheticSource"]
