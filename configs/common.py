"""The base of every config: methods, presets, sizes, every field with its default.

A config file's argument is `[preset][,method=METHOD][,size=SIZE][,decoder=DECODER]`,
for example `fmow:published,size=large` or `fmow:method=mae` (short: `fmow:mae`). The
preset `published` follows a method's official code. Only Cross-Scale MAE also has
`corrected`, its default, which follows the paper with its gaps closed. Methods of our
own have `recommended`. A preset alone means Cross-Scale MAE if the config's own method
lacks it. Change any field with `--config.<field>=<value>`.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from xsmae.errors import UserError
from xsmae.methods import METHODS

# embed_dim, depth, num_heads of the encoder, then of the decoder. Ti is our size for
# CPUs. S to H and the decoder 512/8/16 come from MAE and Cross-Scale MAE
# (models_mae.py).
SIZES = {
    "tiny": ((192, 12, 3), (128, 4, 4)),
    "small": ((384, 12, 6), (512, 8, 16)),
    "base": ((768, 12, 12), (512, 8, 16)),
    "large": ((1024, 24, 16), (512, 8, 16)),
    "huge": ((1280, 32, 16), (512, 8, 16)),
}

# Width, blocks and heads. `published` is the one of the size. `small` costs less than a
# tenth of it. The 8 heads of 256/2/8 have 32 channels each, like the 16 heads of the
# published decoder. Ti, whose own decoder costs less, has a smaller one.
DECODERS = ("published", "small")
SMALL_DECODER = {"tiny": (64, 1, 4)}
SMALL_DECODER |= dict.fromkeys(("small", "base", "large", "huge"), (256, 2, 8))
# The methods of our own take the small decoder, unless the argument says otherwise.
OWN_DECODER = {"scale_distill": "small"}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std (torchvision)


def parse_argument(argument: str | None, **defaults: str) -> dict[str, str]:
    """Parses `preset,name=value,...` to the arguments of `get_common`.

    The name of a method means that method: `mae` is `method=mae`. `defaults` replace
    cross_scale_mae and base. Without a method, a preset that the default method lacks
    is that of cross_scale_mae. Raises UserError for an unknown name or value.
    """
    options = {"method": "cross_scale_mae", "size": "base", **defaults}
    named = False  # whether the argument names the method
    for part in filter(None, (argument or "").split(",")):
        name, _, value = part.rpartition("=")
        name = name or ("method" if value in METHODS else "preset")
        if name not in ("preset", "decoder", *options):
            raise UserError(
                f"config argument {part!r}: {name!r} is unknown, expected "
                f"[{'|'.join(METHODS['cross_scale_mae'].presets)}]"
                f"[,method={'|'.join(METHODS)}][,size={'|'.join(SIZES)}]"
                f"[,decoder={'|'.join(DECODERS)}]"
            )
        options[name] = value
        named = named or name == "method"
    for name, known in (("method", METHODS), ("size", SIZES), ("decoder", DECODERS)):
        if name in options and options[name] not in known:
            raise UserError(
                f"config argument {name}={options[name]!r}, expected one of "
                f"{', '.join(known)}"
            )
    presets = METHODS[options["method"]].presets
    if not named and options.get("preset", presets[0]) not in presets:
        options["method"] = "cross_scale_mae"
        presets = METHODS["cross_scale_mae"].presets
    if "decoder" in options and not _has_decoder(options["method"]):
        raise UserError(
            f"config argument decoder={options['decoder']}: method={options['method']} "
            "has no decoder, leave it out"
        )
    preset = options.setdefault("preset", presets[0])
    if preset not in presets:
        raise UserError(
            f"config argument {preset!r}, method={options['method']} expects "
            f"{' or '.join(presets)}"
        )
    return options


def _has_decoder(method: str) -> bool:
    return "model.decoder_depth" not in METHODS[method].unused


def get_common(
    preset: str,
    size: str,
    method: str = "cross_scale_mae",
    decoder: str | None = None,
) -> ml_collections.ConfigDict:
    """The whole config except `data`, with the fields that the argument decides.

    decoder: one of `DECODERS`; None: the method's own.
    """
    decoder = decoder or OWN_DECODER.get(method, "published")
    config = ml_collections.ConfigDict()
    config.method = method  # set by the config's argument
    # Imported weights or another run's workdir; a new run starts with their weights.
    config.init = placeholder(str)
    config.seed = 0  # of weights, crops and masks
    config.batch_size = 512  # samples per step, over all devices
    # All devices share the batch. Devices along fsdp also share the state.
    config.mesh = "data:-1"
    config.num_epochs = 400.0  # passes over the images
    config.num_steps = placeholder(int)  # if set, used instead of num_epochs

    # The images' statistics in 0-1, and their bands in order. They are stored with the
    # weights. The config of each data set sets its own.
    config.bands = ("red", "green", "blue")
    config.mean, config.std = IMAGENET  # of each band, in 0-1

    config.views = views = ml_collections.ConfigDict()
    views.size = 128  # pixels, height and width of the encoder's input
    views.area = (0.25, 1.0)  # view 1, as a fraction of the image
    views.ratio = (3 / 4, 4 / 3)  # width / height of the crops
    views.area_distribution = "uniform"  # or log_uniform
    # Of view 1: bicubic or bilinear. Views of rasters with invalid pixels are always
    # resampled with a triangle filter, as bilinear does.
    views.interpolation = "bicubic"
    views.horizontal_flip = 0.5  # probability
    views.vertical_flip = 0.5  # probability
    # h, to multiply the values of each view by a random factor from 1 - h to 1 + h; 0:
    # off.
    views.brightness = 0.0
    views.contrast = 0.0  # like brightness, of the distances to each band's mean
    # Like brightness, of the distances to the mean of red, green and blue in each
    # pixel; only if these are the bands.
    views.saturation = 0.0
    views.band_gain = 0.0  # like brightness, with a factor for each band
    # Steps in which brightness, contrast, saturation and band_gain grow linearly from
    # 0; 0: no ramp.
    views.photometric_ramp = 0

    (embed_dim, depth, num_heads), of_size = SIZES[size]
    config.model = model = ml_collections.ConfigDict()
    model.patch_size = 16  # pixels, height and width
    # Width, blocks and attention heads; set by the size.
    model.embed_dim, model.depth, model.num_heads = embed_dim, depth, num_heads
    # Width, blocks and heads of the decoder; set by the size and by `decoder`.
    if decoder == "small":
        of_size = SMALL_DECODER[size]
    model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads = of_size
    model.mlp_ratio = 4.0  # hidden width of a block's MLP, in widths of the block
    model.mask_ratio = 0.75  # fraction of the patches that is hidden
    model.norm_style = "pre"  # or post: norm before or after the residual sum
    model.norm_epsilon = 1e-6  # of every layer norm
    model.encoder_norm = True  # apply the encoder's final LayerNorm
    model.position = "fixed"  # or gsd: scale positions by each image's GSD
    model.reference_gsd = 1.0  # metres per pixel at which patch positions step by 1
    model.dtype = "bfloat16"  # for computation; parameters are float32
    model.attention = "auto"  # or pallas, cudnn, xla: xsmae.ops.attention
    # What the backward pass recomputes: none, elementwise (all except products and
    # attention), dots (all except dense layers), full.
    model.remat = "elementwise"
    # False unrolls the blocks, for GPUs. On CPUs, `remat` then has no effect.
    model.scan = True

    config.loss = ml_collections.ConfigDict()  # one group of fields per loss term

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 1.5e-4  # peak
    optim.learning_rate_batch = 256  # the rate is for this batch size, scaled linearly
    optim.weight_decay = 0.05  # none on biases and norms
    optim.b1, optim.b2 = 0.9, 0.95  # AdamW's moments
    optim.warmup_epochs = 40.0  # linear warm-up; then a cosine to 0
    optim.warmup_steps = placeholder(int)  # if set, used instead of warmup_epochs
    optim.clip_norm = 0.0  # largest gradient norm; 0: no clipping
    optim.accumulation_steps = 1  # parts that a batch is computed in
    optim.max_nonfinite = 10  # non-finite losses in a row before the run stops

    config.input = ml_collections.ConfigDict()
    config.input.num_workers = 0  # reader processes; 0: threads of this process
    config.input.num_threads = 4  # threads that read images, per process
    config.input.prefetch = 4  # batches
    # The run stops if more than this fraction of the images, and more than one, is bad.
    # 0: it stops at the first bad image.
    config.input.max_rejected_fraction = 0.01

    # Intervals are in steps. A run chooses unset intervals by its length, and other
    # fields that a config leaves unset: xsmae/run/choices.py.
    config.log_every = placeholder(int)  # 20 times in a run, at most every 50 steps
    # (10, 15) writes a trace of steps 10 to 15, counted from 1, to <workdir>/profile.
    config.profile = ()
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = placeholder(int)  # 5 times, at least every 1000 steps
    config.checkpoint.keep = 3  # the newest checkpoints
    config.checkpoint.keep_every = 0  # also keep multiples of this step; 0: none
    # Saves in a row that may fail (such as on a full disk) before the run stops; 0:
    # none. 3 give the user time to free space; at most the work of three saves is lost.
    config.checkpoint.keep_going_without_checkpoints = 3
    # The run ends if it does no step and no evaluation batch for this long, so that it
    # can be started again; 0: never. The default is longer than Orbax's limit of 20
    # minutes for a save, and longer than any compilation seen.
    config.watchdog_minutes = 30.0
    config.figures = ml_collections.ConfigDict()
    config.figures.every = placeholder(int)  # 4 times, at most 5000; 0: only at the end
    config.figures.samples = 6  # images in a picture of reconstructions
    # Three bands of rasters to show as red, green and blue; true colour where known.
    config.figures.colours = placeholder(tuple)

    # The kNN monitor, for data with labels. `train` and `test` override fields of
    # `data` for the labelled bank and for the queries.
    config.knn = knn = ml_collections.ConfigDict()
    knn.every = placeholder(int)  # 4 times, at most 5000; 0: only at the end; -1: never
    knn.train = ml_collections.ConfigDict()
    knn.test = ml_collections.ConfigDict()
    knn.k = 20  # k and temperature follow Scale-MAE's protocol
    knn.temperature = 0.07  # of the votes, exp(similarity / temperature)
    knn.max_train = 5000  # images, evenly spaced, during the run; 0: all
    knn.max_test = 1000  # like max_train, of the test images
    knn.full_at_end = True  # use all images at the end
    knn.batch_size = 256  # images that the encoder gets at a time

    config.tensorboard = True  # write events for TensorBoard
    config.wandb = False  # log to Weights & Biases too

    for group, values in (
        METHODS[method].fields(preset, size=size, model=config.model.to_dict()).items()
    ):
        config[group].update(ml_collections.ConfigDict(values))
    if decoder == "small":  # Scale-MAE's fields have a depth of their own
        model.update(decoder_depth=of_size[1])
    for name in METHODS[method].unused:
        group, _, field = name.partition(".")
        del config[group][field]
    return config
