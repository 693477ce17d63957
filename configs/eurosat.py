"""EuroSAT RGB (27,000 Sentinel-2 tiles of 64 px, 10 m), a folder of class folders.

Needs `--config.data.root=DIR`. The default split is the project's own rule. To use the
split of the papers' kNN tables, give it as two lists of paths:
`--config.data.split=TRAIN.txt --config.knn.test.split=TEST.txt`.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import common


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="tiny")
    config = common.get_common(**options)
    config.data = dict(
        source="folder",
        root=placeholder(str),
        gsd=10.0,
        gsd_csv=placeholder(str),
        split="train",
        test_fraction=0.2,
        min_side=32,
        max_pixels=89_478_485,
    )
    # Measured over all 27,000 images.
    config.mean = (0.3444, 0.3803, 0.4078)
    config.std = (0.2027, 0.1369, 0.1156)
    config.views.size = 64
    config.model.patch_size = 8
    config.model.reference_gsd = 10.0
    config.model.dtype = "float32"  # the fastest on CPUs
    # About half an hour on two cores.
    config.batch_size = 64
    config.num_epochs = 3.0
    config.optim.warmup_epochs = 0.3
    config.optim.learning_rate = 4e-3
    config.knn.test.split = "test"
    config.knn.every = 250
    config.checkpoint.every = 100
    config.figures.every = 500
    return config
