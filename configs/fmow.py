"""fMoW-RGB as distributed, with the paper's recipe. Needs `--config.data.root=DIR`."""

from ml_collections.config_dict import placeholder
from xsmae.configs import common


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument)
    config = common.get_common(**options)
    config.data = dict(
        source="fmow",
        root=placeholder(str),  # contains train/ and val/
        split="train",
        kind="rgb",
        gsd=placeholder(float),  # overrides the GSD in each JSON
        crop=True,
        context=0.25,
        min_side=32,
        max_pixels=89_478_485,
    )
    config.knn.test.split = "val"
    # Statistics from the official Cross-Scale MAE code.
    config.mean = (0.43393, 0.43579, 0.40744)
    config.std = (0.19828, 0.19250, 0.19454)
    return config
