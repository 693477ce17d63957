"""A run of a few minutes on two CPU cores, on the built-in synthetic world."""

from xsmae.configs import common


def get_config(argument=None):
    """argument: `[preset][,name=value...]`; see common.py."""
    options = common.parse_argument(argument, method="scale_distill", size="tiny")
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
            config.model.decoder_depth = min(2, config.model.decoder_depth)
    if options["method"] == "scale_distill":
        # In the same time, twice the steps with fewer tokens teach more.
        config.model.mask_ratio = 0.85
    config.batch_size = 64
    config.num_steps = 600
    config.optim.warmup_steps = 60
    config.optim.learning_rate = 4e-3
    config.log_every = 40
    config.checkpoint.every = 200
    config.figures.every = 0
    config.knn.every = 200
    config.knn.max_train = 2000
    config.knn.max_test = 500
    return config
