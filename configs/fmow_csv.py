"""fMoW-RGB from a CSV of paths, such as SatMAE's. Needs `--config.data.csv_path=FILE`.

The GSD comes from the JSON beside each image, unless the CSV has a column for it.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import fmow


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    config = fmow.get_config(argument)
    config.data = dict(
        source="fmow_csv",
        csv_path=placeholder(str),
        root=placeholder(str),  # paths are relative to it; default: the CSV's folder
        kind="rgb",
        gsd=placeholder(float),
        crop=True,
        context=0.25,
        split="all",
        test_fraction=0.1,
        min_side=32,
        max_pixels=89_478_485,
    )
    config.knn.train.split = "train"
    config.knn.test.split = "test"
    return config
