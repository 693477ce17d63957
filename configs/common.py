"""What every config starts from: the presets, the sizes, every field with its default.

A config file's argument is `[preset][,name=value...]`, for example
`configs/fmow.py:published,size=large`. `published` is the official Cross-Scale MAE
code, `corrected` what the paper describes with its gaps closed, `mae` the plain masked
autoencoder. Any field is then changed with `--config.<field>=<value>`.
"""

import ml_collections
from ml_collections.config_dict import placeholder

PRESETS = ("published", "corrected", "mae")

# embed_dim, depth, num_heads; then the decoder's. Ti is ours, for CPUs; S to H and the
# decoder of 512/8/16 are MAE's and Cross-Scale MAE's (models_mae.py).
SIZES = {
    "tiny": ((192, 12, 3), (128, 4, 4)),
    "small": ((384, 12, 6), (512, 8, 16)),
    "base": ((768, 12, 12), (512, 8, 16)),
    "large": ((1024, 24, 16), (512, 8, 16)),
    "huge": ((1280, 32, 16), (512, 8, 16)),
}


def parse_argument(argument: str | None, **defaults: str) -> dict[str, str]:
    """`preset,name=value,...` to a dict with the keys `preset` and `size`.

    Raises ValueError, in one line, for a name or value that is not known.
    """
    options = {"preset": "corrected", "size": "base", **defaults}
    for part in filter(None, (argument or "").split(",")):
        name, _, value = part.rpartition("=")
        name = name or "preset"
        if name not in options:
            raise ValueError(
                f"config argument {part!r}: {name!r} is not known, expected "
                f"[{'|'.join(PRESETS)}][,size={'|'.join(SIZES)}]"
            )
        options[name] = value
    for name, known in (("preset", PRESETS), ("size", tuple(SIZES))):
        if options[name] not in known:
            raise ValueError(
                f"config argument {name}={options[name]!r}, expected one of "
                f"{', '.join(known)}"
            )
    return options


def get_common(preset: str, size: str) -> ml_collections.ConfigDict:
    """The whole config but for `data`, with the fields that `preset` decides."""
    published, corrected = preset == "published", preset == "corrected"
    config = ml_collections.ConfigDict()
    config.method = "mae" if preset == "mae" else "cross_scale_mae"
    config.seed = 0
    config.batch_size = 512  # samples a step, over all devices
    config.num_epochs = 400.0
    config.num_steps = placeholder(int)  # where set, instead of num_epochs

    # The images' statistics in 0-1, and their bands in order; they travel with the
    # weights. Each data set's config sets its own.
    config.bands = ("red", "green", "blue")
    config.mean = (0.485, 0.456, 0.406)  # ImageNet's (torchvision)
    config.std = (0.229, 0.224, 0.225)

    config.views = views = ml_collections.ConfigDict()
    views.size = 128  # pixels, height and width of a view
    views.area = (0.25, 1.0)  # view 1, as a fraction of the image
    views.area2 = (0.25, 0.75)  # view 2, as a fraction of view 1
    views.ratio = (3 / 4, 4 / 3)  # width / height of both
    # How an area is drawn; log_uniform draws the effective GSD log-uniformly.
    views.area_distribution = "log_uniform" if corrected else "uniform"
    views.view2_from = "view1" if published else "source"  # pixels it is cut from
    views.view2_box = "batch" if published else "sample"  # one box per ...
    views.interpolation = "bicubic"
    views.interpolation2 = "bilinear" if published else "bicubic"
    views.horizontal_flip = 0.5  # probability
    views.vertical_flip = 0.5

    (embed_dim, depth, num_heads), decoder = SIZES[size]
    config.model = model = ml_collections.ConfigDict()
    model.patch_size = 16
    model.embed_dim, model.depth, model.num_heads = embed_dim, depth, num_heads
    model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads = decoder
    model.mlp_ratio = 4.0
    model.mask_ratio = 0.75
    # Post-norm with 1e-5 is the xFormers setting of the released weights; the official
    # code with timm's blocks is pre-norm with 1e-6.
    model.norm_style = "post" if published else "pre"
    model.norm_epsilon = 1e-5 if published else 1e-6
    model.encoder_norm = not published  # the encoder's final LayerNorm is applied
    model.position = "gsd" if corrected else "fixed"
    model.reference_gsd = 1.0  # metres per pixel at which a patch index counts 1
    if config.method == "cross_scale_mae":
        model.predictor_norm = "batch_norm" if published else "layer_norm"
        model.predictor_hidden_dim = 4 * model.decoder_embed_dim
        # 0: no projection head. 128 is SimCLR's.
        model.projection_dim = 128 if corrected else 0
    model.dtype = "bfloat16"  # of the computation; parameters are float32
    model.attention = "xla"
    model.remat = "none"  # none, dots, full: what is recomputed in the backward pass
    model.scan = True  # False unrolls the blocks

    config.loss = loss = ml_collections.ConfigDict()
    loss.reconstruction = ml_collections.ConfigDict()
    loss.reconstruction.weight = 1.0
    loss.reconstruction.norm_pix_loss = not published
    if config.method == "cross_scale_mae":
        loss.reconstruction.views = "sum" if published else "mean"
        loss.contrastive = ml_collections.ConfigDict()
        loss.contrastive.weight = 1.0
        loss.contrastive.temperature = 0.5
        loss.contrastive.positive_in_denominator = not published
        # Negatives from the global batch (1) or from its own n-th part of it (n): what
        # the official code computes on n GPUs, each with its local negatives.
        loss.contrastive.groups = 1
        loss.cross_prediction = ml_collections.ConfigDict()
        loss.cross_prediction.weight = 1.0
        loss.cross_prediction.stop_gradient = not published
        loss.cross_prediction.aligned = not published

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 5e-5 if config.method == "cross_scale_mae" else 1.5e-4
    optim.learning_rate_batch = 256  # the rate is for this batch and scales with it
    optim.weight_decay = 0.05
    optim.b1, optim.b2 = 0.9, 0.95
    optim.warmup_epochs = 40.0
    optim.warmup_steps = placeholder(int)  # where set, instead of warmup_epochs
    optim.clip_norm = 0.0  # largest gradient norm; 0: no clipping
    optim.accumulation_steps = 1
    optim.max_nonfinite = 10  # non-finite losses in a row before the run stops

    config.input = ml_collections.ConfigDict()
    config.input.num_workers = 0  # processes; 0 reads in threads of this one
    config.input.num_threads = 4
    config.input.prefetch = 4  # batches
    # The run stops when more than this fraction of the images turns out bad.
    config.input.max_rejected_fraction = 0.01

    config.log_every = 50  # steps
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 3  # the newest ones
    config.checkpoint.keep_every = 0  # and every one of this many steps; 0: none
    config.figures = ml_collections.ConfigDict()
    config.figures.every = 5000  # steps; 0: at the end alone
    config.figures.samples = 6

    # The kNN monitor, where the data has labels. `train` and `test` are what differs
    # from `data` for the labelled bank and the queries.
    config.knn = knn = ml_collections.ConfigDict()
    knn.every = 5000  # steps; 0: at the end alone; -1: never
    knn.train = ml_collections.ConfigDict()
    knn.test = ml_collections.ConfigDict()
    knn.k = 20  # k and temperature: Scale-MAE's protocol
    knn.temperature = 0.07
    knn.max_train = 5000  # images, evenly spaced, during the run; 0: all
    knn.max_test = 1000
    knn.full_at_end = True  # all of them at the end
    knn.batch_size = 256

    config.tensorboard = True
    config.wandb = False
    return config
