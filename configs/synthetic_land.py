"""The built-in synthetic world with the land of every pixel: 7 classes, no download.

The test part is another world. See segmentation.py.
"""

from xsmae.configs import common, segmentation


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="small")
    config = segmentation.get_config(",".join(f"{k}={v}" for k, v in options.items()))
    config.data = dict(
        source="synthetic_land", num_images=400, seed=0, size=128, gsd=1.0
    )
    config.knn.train = dict()
    config.knn.test = dict(num_images=100, seed=1)
    return config
