"""A CSV of images: `path`, optionally `label` and `gsd`. Needs `data.csv_path`."""

from ml_collections.config_dict import placeholder
from xsmae.configs import folder


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    config = folder.get_config(argument)
    config.data = dict(
        source="csv",
        csv_path=placeholder(str),
        root=placeholder(str),  # paths are relative to it; default: the CSV's folder
        gsd=placeholder(float),  # if the CSV has no gsd column
        split="all",
        test_fraction=0.1,
        min_side=32,
        max_pixels=89_478_485,
    )
    config.model.reference_gsd = config.data.get_oneway_ref("gsd")
    return config
