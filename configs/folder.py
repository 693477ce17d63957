"""Your own folder of JPEG, PNG, WebP or TIFF images, with optional class folders.

Needs `--config.data.root=DIR` and `--config.data.gsd=METRES` or
`--config.data.gsd_csv=FILE`.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import common


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="small")
    config = common.get_common(**options)
    config.data = dict(
        source="folder",
        root=placeholder(str),
        gsd=placeholder(float),  # metres per pixel of every image
        gsd_csv=placeholder(str),  # or a CSV with the columns path,gsd
        split="all",
        test_fraction=0.1,
        min_side=32,
        max_pixels=89_478_485,
    )
    # The reference GSD follows `gsd`. With `gsd_csv`, give it too.
    config.model.reference_gsd = config.data.get_oneway_ref("gsd")
    # A run chooses these by the images and the device, and prints them at its start.
    config.batch_size = placeholder(int)  # at most 256
    config.views.size = placeholder(int)  # at most 128
    config.model.patch_size = placeholder(int)  # 16, or 8 for small images
    config.model.dtype = placeholder(str)  # bfloat16, or float32 on CPUs
    config.mean = placeholder(tuple)  # measured on a sample
    config.std = placeholder(tuple)
    config.num_epochs = 100.0
    config.optim.warmup_epochs = 10.0
    config.optim.learning_rate = 1.5e-4  # MAE's rate, for shorter runs on smaller data
    config.knn.train.split = "train"
    config.knn.test.split = "test"
    return config
