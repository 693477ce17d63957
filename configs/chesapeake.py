"""Chesapeake land cover on NAIP: 16 patches of 256 px, red, green, blue, nir, 1 m.

Needs `--data.root=DIR`, the folder with `naip_new/`, `masks/`, `classes.json`,
`train.txt` and `test.txt`. The patches of a quarter quad are a scene. `images=naip_old`
takes the earlier date. Two of the six classes do not occur. See segmentation.py.
"""

from xsmae.configs import common, segmentation


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="small")
    config = segmentation.get_config(",".join(f"{k}={v}" for k, v in options.items()))
    config.data.update(images="naip_new", sensor="naip", gsd=1.0, scene="(.+)-[0-9]+")
    config.knn.train.split = "train.txt"
    config.knn.test.split = "test.txt"
    return config
