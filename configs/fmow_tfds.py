"""fMoW-RGB prepared by `python -m xsmae.data.fmow_tfds`. Needs data.data_dir.

Each record contains its GSD and the labelled box.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import fmow


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    config = fmow.get_config(argument)
    config.data = dict(
        source="tfds",
        name="fmow/rgb",
        data_dir=placeholder(str),
        split="train",
        crop=True,
        context=0.25,
        min_side=32,
        max_pixels=89_478_485,
    )
    return config
