"""UC Merced Land Use (2,100 aerial images of 256 px, 0.3048 m), a folder of classes.

Needs `--config.data.root=DIR` with the TIFFs as distributed, or copies in another
format. The splits follow the same rule as in `eurosat.py`.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import common


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument)
    config = common.get_common(**options)
    config.data = dict(
        source="folder",
        root=placeholder(str),
        gsd=0.3048,  # one foot
        gsd_csv=placeholder(str),
        split="train",
        test_fraction=0.1,
        min_side=32,
        max_pixels=89_478_485,
    )
    # Measured over all 2,100 images.
    config.mean = (0.4842, 0.4901, 0.4505)
    config.std = (0.2180, 0.2021, 0.1958)
    config.model.reference_gsd = 0.3048
    config.model.dtype = "float32"  # the fastest on CPUs
    config.batch_size = 64
    config.num_epochs = 200.0
    config.optim.warmup_epochs = 10.0
    config.optim.learning_rate = 1.5e-4
    config.knn.test.split = "test"
    config.knn.every = 1000
    config.checkpoint.every = 500
    config.figures.every = 1000
    return config
