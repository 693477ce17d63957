"""What every config starts from: methods, presets, sizes, every field with its default.

A config file's argument is `[preset][,method=METHOD][,size=SIZE]`, for example
`configs/fmow.py:published,size=large` or `configs/fmow.py:method=mae`. `published` is
what a method's official code computes. Cross-Scale MAE alone has `corrected` too, its
default: what the paper describes with its gaps closed. Any field is then changed with
`--config.<field>=<value>`.
"""

import ml_collections
from ml_collections.config_dict import placeholder

# The presets of each method, the default first.
METHODS = {
    "cross_scale_mae": ("corrected", "published"),
    "mae": ("published",),
    "sat_mae": ("published",),
    "scale_mae": ("published",),
}

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
    """`preset,name=value,...` to a dict with the keys `preset`, `method` and `size`.

    Raises ValueError, in one line, for a name or value that is not known.
    """
    options = {"method": "cross_scale_mae", "size": "base", **defaults}
    for part in filter(None, (argument or "").split(",")):
        name, _, value = part.rpartition("=")
        name = name or "preset"
        if name not in ("preset", *options):
            raise ValueError(
                f"config argument {part!r}: {name!r} is not known, expected "
                f"[{'|'.join(METHODS['cross_scale_mae'])}][,method={'|'.join(METHODS)}]"
                f"[,size={'|'.join(SIZES)}]"
            )
        options[name] = value
    for name, known in (("method", tuple(METHODS)), ("size", tuple(SIZES))):
        if options[name] not in known:
            raise ValueError(
                f"config argument {name}={options[name]!r}, expected one of "
                f"{', '.join(known)}"
            )
    presets = METHODS[options["method"]]
    preset = options.setdefault("preset", presets[0])
    if preset not in presets:
        raise ValueError(
            f"config argument {preset!r}, expected for method={options['method']} "
            f"{' or '.join(presets)}"
        )
    return options


def get_common(
    preset: str, size: str, method: str = "cross_scale_mae"
) -> ml_collections.ConfigDict:
    """The whole config but for `data`, with the fields that the argument decides."""
    cross_scale = method == "cross_scale_mae"
    # Cross-Scale MAE as published differs from the other methods and from itself.
    published, corrected = cross_scale and preset == "published", preset == "corrected"
    config = ml_collections.ConfigDict()
    config.method = method
    # An import or another run's workdir, whose weights and sizes a new run starts from.
    config.init = placeholder(str)
    config.seed = 0
    config.batch_size = 512  # samples a step, over all devices
    # All devices share the batch; those along fsdp each other's part of the state too.
    config.mesh = "data:-1"
    config.num_epochs = 400.0
    config.num_steps = placeholder(int)  # where set, instead of num_epochs

    # The images' statistics in 0-1, and their bands in order; they travel with the
    # weights. Each data set's config sets its own.
    config.bands = ("red", "green", "blue")
    config.mean = (0.485, 0.456, 0.406)  # ImageNet's (torchvision)
    config.std = (0.229, 0.224, 0.225)

    config.views = views = ml_collections.ConfigDict()
    views.size = 128  # pixels, height and width of what the encoder reads
    views.area = (0.25, 1.0)  # view 1, as a fraction of the image
    views.ratio = (3 / 4, 4 / 3)  # width / height of the crops
    # How an area is drawn; log_uniform draws the effective GSD log-uniformly.
    views.area_distribution = "log_uniform" if corrected else "uniform"
    views.interpolation = "bicubic"
    views.horizontal_flip = 0.5  # probability
    views.vertical_flip = 0.5
    if cross_scale:
        views.area2 = (0.25, 0.75)  # view 2, as a fraction of view 1
        views.view2_from = "view1" if published else "source"  # pixels it is cut from
        views.view2_box = "batch" if published else "sample"  # one box per ...
        views.interpolation2 = "bilinear" if published else "bicubic"

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
    gsd_positions = corrected or method == "scale_mae"
    model.position = "gsd" if gsd_positions else "fixed"
    model.reference_gsd = 1.0  # metres per pixel at which a patch index counts 1
    if cross_scale:
        model.predictor_norm = "batch_norm" if published else "layer_norm"
        model.predictor_hidden_dim = 4 * model.decoder_embed_dim
        # 0: no projection head. 128 is SimCLR's.
        model.projection_dim = 128 if corrected else 0
    elif method == "sat_mae":
        # Groups of bands by index, ((0,), (1, 2)); none is the plain MAE, which is
        # what SatMAE trains on RGB.
        model.channel_groups = ()
        # Channels of the encoding of the group; official B and L: 256 and 128.
        model.group_dim = 256 if embed_dim >= 768 else embed_dim // 4
        model.decoder_group_dim = model.decoder_embed_dim // 4
        model.spatial_mask = False  # True: one mask for all groups
        # `concatenated` compares a group's prediction with another group's bands where
        # the groups are not in order, as the official code does.
        model.band_order = "concatenated"
    elif method == "scale_mae":
        model.decoder_depth = 3
        model.target_scale = 2  # the predicted image's sides, in the view's
        model.head_dim = 64 if size == "tiny" else 512  # channels; official: 512
        model.head_depth = 2
        model.independent_heads = True
        model.progressive = False  # the finer map continues from the coarser
    model.dtype = "bfloat16"  # of the computation; parameters are float32
    model.attention = "auto"  # or pallas, cudnn, xla: xsmae.ops.attention
    # What the backward pass computes again: none, elementwise (all but products and
    # attention), dots (all but dense layers), full.
    model.remat = "elementwise"
    # False unrolls the blocks: for GPUs; on CPUs `remat` does nothing then.
    model.scan = True

    config.loss = loss = ml_collections.ConfigDict()
    if method == "scale_mae":
        loss.low_frequency = ml_collections.ConfigDict()
        loss.low_frequency.weight = 1.0
        # Pixels a side that the low band's target is averaged to first; 0: none. The
        # official code does so where its second band_config is 224.
        loss.low_frequency.through = 0
        loss.high_frequency = ml_collections.ConfigDict()
        loss.high_frequency.weight = 1.0
        loss.high_frequency.absolute = True  # L1; False: L2
        # The low-pass image's side, as a fraction of the target's: official 14 of 448.
        loss.high_frequency.cutoff = 1 / 32
    else:
        loss.reconstruction = ml_collections.ConfigDict()
        loss.reconstruction.weight = 1.0
        loss.reconstruction.norm_pix_loss = not published
    if cross_scale:
        loss.reconstruction.views = "sum" if published else "mean"
        loss.contrastive = ml_collections.ConfigDict()
        loss.contrastive.weight = 1.0
        # 0.1: SimCLR's best (Chen et al. 2020, table 5); 0.5 costs `corrected` four
        # points of kNN, docs/study.md.
        loss.contrastive.temperature = 0.5 if published else 0.1
        loss.contrastive.positive_in_denominator = not published
        # Negatives from the global batch (1) or from its own n-th part of it (n): what
        # the official code computes on n GPUs, each with its local negatives.
        loss.contrastive.groups = 1
        loss.cross_prediction = ml_collections.ConfigDict()
        loss.cross_prediction.weight = 1.0
        loss.cross_prediction.stop_gradient = not published
        loss.cross_prediction.aligned = not published

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 5e-5 if cross_scale else 1.5e-4
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
    # The run stops when more than this fraction of the images, and more than one, turns
    # out bad; 0: at the first.
    config.input.max_rejected_fraction = 0.01

    config.log_every = 50  # steps
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 3  # the newest ones
    config.checkpoint.keep_every = 0  # and every one of this many steps; 0: none
    # Saves in a row that may fail, the disk being full, before the run stops; 0: none.
    # 3 leave a night to make room, and what can be lost is the work of three saves.
    config.checkpoint.keep_going_without_checkpoints = 3
    # Without a step, or a batch of an evaluation, for so long the run ends, so that it
    # can be started again; 0: never. Longer than the 20 minutes that Orbax gives one
    # save, and than any compilation seen.
    config.watchdog_minutes = 30.0
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
