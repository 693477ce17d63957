"""What every config starts from: methods, presets, sizes, every field with its default.

A config file's argument is `[preset][,method=METHOD][,size=SIZE]`, for example
`fmow:published,size=large` or `fmow:method=mae`, for which `fmow:mae` does. `published`
is what a method's official code computes. Cross-Scale MAE alone has `corrected` too,
its default: what the paper describes with its gaps closed. Any field is then changed
with `--config.<field>=<value>`.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from xsmae.errors import UserError
from xsmae.methods import METHODS

# embed_dim, depth, num_heads; then the decoder's. Ti is ours, for CPUs; S to H and the
# decoder of 512/8/16 are MAE's and Cross-Scale MAE's (models_mae.py).
SIZES = {
    "tiny": ((192, 12, 3), (128, 4, 4)),
    "small": ((384, 12, 6), (512, 8, 16)),
    "base": ((768, 12, 12), (512, 8, 16)),
    "large": ((1024, 24, 16), (512, 8, 16)),
    "huge": ((1280, 32, 16), (512, 8, 16)),
}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std (torchvision)


def parse_argument(argument: str | None, **defaults: str) -> dict[str, str]:
    """`preset,name=value,...` to a dict with the keys `preset`, `method` and `size`.

    A method's name alone is the method: `mae` is `method=mae`. Raises UserError for a
    name or value that is not known.
    """
    options = {"method": "cross_scale_mae", "size": "base", **defaults}
    for part in filter(None, (argument or "").split(",")):
        name, _, value = part.rpartition("=")
        name = name or ("method" if value in METHODS else "preset")
        if name not in ("preset", *options):
            raise UserError(
                f"config argument {part!r}: {name!r} is not known, expected "
                f"[{'|'.join(METHODS['cross_scale_mae'].presets)}]"
                f"[,method={'|'.join(METHODS)}][,size={'|'.join(SIZES)}]"
            )
        options[name] = value
    for name, known in (("method", tuple(METHODS)), ("size", tuple(SIZES))):
        if options[name] not in known:
            raise UserError(
                f"config argument {name}={options[name]!r}, expected one of "
                f"{', '.join(known)}"
            )
    presets = METHODS[options["method"]].presets
    preset = options.setdefault("preset", presets[0])
    if preset not in presets:
        raise UserError(
            f"config argument {preset!r}, expected for method={options['method']} "
            f"{' or '.join(presets)}"
        )
    return options


def get_common(
    preset: str, size: str, method: str = "cross_scale_mae"
) -> ml_collections.ConfigDict:
    """The whole config but for `data`, with the fields that the argument decides."""
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
    config.mean, config.std = IMAGENET

    config.views = views = ml_collections.ConfigDict()
    views.size = 128  # pixels, height and width of what the encoder reads
    views.area = (0.25, 1.0)  # view 1, as a fraction of the image
    views.ratio = (3 / 4, 4 / 3)  # width / height of the crops
    views.area_distribution = "uniform"  # how an area is drawn
    views.interpolation = "bicubic"
    views.horizontal_flip = 0.5  # probability
    views.vertical_flip = 0.5

    (embed_dim, depth, num_heads), decoder = SIZES[size]
    config.model = model = ml_collections.ConfigDict()
    model.patch_size = 16
    model.embed_dim, model.depth, model.num_heads = embed_dim, depth, num_heads
    model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads = decoder
    model.mlp_ratio = 4.0
    model.mask_ratio = 0.75
    model.norm_style = "pre"
    model.norm_epsilon = 1e-6
    model.encoder_norm = True  # the encoder's final LayerNorm is applied
    model.position = "fixed"  # or gsd: positions are scaled by each image's GSD
    model.reference_gsd = 1.0  # metres per pixel at which a patch index counts 1
    model.dtype = "bfloat16"  # of the computation; parameters are float32
    model.attention = "auto"  # or pallas, cudnn, xla: xsmae.ops.attention
    # What the backward pass computes again: none, elementwise (all but products and
    # attention), dots (all but dense layers), full.
    model.remat = "elementwise"
    # False unrolls the blocks: for GPUs; on CPUs `remat` does nothing then.
    model.scan = True

    config.loss = ml_collections.ConfigDict()  # a group of fields per term

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 1.5e-4
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

    # In steps. An interval that is not set is chosen by the length of the run; so are
    # the fields that a config sets to None: xsmae/run/choices.py.
    config.log_every = placeholder(int)  # 20 times in a run, at most 50 steps
    # (10, 15): a trace of these steps, the first from 1, goes to <workdir>/profile.
    config.profile = ()
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = placeholder(int)  # 5 times, at most 1000 steps
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
    config.figures.every = placeholder(int)  # 4 times, at most 5000; 0: at the end
    config.figures.samples = 6

    # The kNN monitor, where the data has labels. `train` and `test` are what differs
    # from `data` for the labelled bank and the queries.
    config.knn = knn = ml_collections.ConfigDict()
    knn.every = placeholder(int)  # 4 times, at most 5000; 0: at the end; -1: never
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

    for group, values in (
        METHODS[method].fields(preset, size=size, model=config.model.to_dict()).items()
    ):
        config[group].update(ml_collections.ConfigDict(values))
    return config
