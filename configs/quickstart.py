"""A run of a few minutes on two CPU cores, on the built-in synthetic world."""

from xsmae.configs import common


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="tiny")
    config = common.get_common(**options)
    config.data = dict(source="synthetic", num_images=4000, seed=0, size=96, gsd=1.0)
    config.knn.test.num_images = 1000
    config.knn.test.seed = 1
    config.views.size = 64
    config.model.patch_size = 8
    config.model.dtype = "float32"  # the fastest on CPUs
    if options["size"] == "tiny":
        config.model.depth = 6
        if "decoder_depth" in config.model:  # SimCLR has no decoder
            config.model.decoder_depth = 2
    config.batch_size = 64
    config.num_steps = 300
    config.optim.warmup_steps = 30
    config.optim.learning_rate = 4e-3
    config.log_every = 20
    config.checkpoint.every = 100
    config.figures.every = 0
    config.knn.every = 100
    config.knn.max_train = 2000
    config.knn.max_test = 500
    return config
