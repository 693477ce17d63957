"""A TFDS data set prepared as ArrayRecord. Needs data.name, data.data_dir, data.gsd.

Suitable names in TFDS's catalogue: `eurosat/rgb` (10 m), `resisc45` (0.2 to 30 m),
`uc_merced` (0.3048 m). For fMoW see `fmow_tfds.py`.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import folder


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    config = folder.get_config(argument)
    config.data = dict(
        source="tfds",
        name=placeholder(str),
        data_dir=placeholder(str),
        gsd=placeholder(float),
        split="train",
        test_fraction=0.2,
        min_side=32,
        max_pixels=89_478_485,
    )
    config.model.reference_gsd = config.data.get_oneway_ref("gsd")
    return config
