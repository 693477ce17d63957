"""Aerial images of Dubai with masks of 5 classes (Humans in the Loop, MBRSC; CC0).

Needs `--data.root=DIR`, the folder with `images/`, `masks/`, `classes.json`,
`train.txt` and `test.txt`, and `--data.gsd=METRES`: the data card does not state it.
Tiles that overlap on the ground are on one side of the lists. See segmentation.py.
"""

from xsmae.configs import common, segmentation


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="small")
    config = segmentation.get_config(",".join(f"{k}={v}" for k, v in options.items()))
    config.knn.train.split = "train.txt"
    config.knn.test.split = "test.txt"
    return config
