"""The presets, and every config number outside its range, refused by name."""

import math

import pytest
from xsmae.configs import common

from xsmae.cli import pretrain
from xsmae.cli.arguments import parse
from xsmae.config import RANGES as COMMON
from xsmae.config import check_ranges, flatten
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.ranges import BELOW_1, LARGE, SMALL

PRESETS = [
    ("published", "cross_scale_mae"),
    ("corrected", "cross_scale_mae"),
    ("published", "mae"),
    ("published", "sat_mae"),
    ("published", "scale_mae"),
    ("recommended", "scale_distill"),
    ("recommended", "sigreg"),
    ("recommended", "simclr"),
]
RANGES = dict(COMMON)
for method in METHODS.values():
    RANGES |= method.ranges
# Fields that may be any whole number, or that other code checks.
ELSEWHERE = {"model.channel_groups", "bands"}


def config_of(preset="corrected", method="cross_scale_mae"):
    config = common.get_common(preset, "tiny", method)
    config.model.reference_gsd = 1.0
    return config


def holds(name):
    """A config with the field."""
    configs = (config_of(*preset) for preset in PRESETS)
    return next(c for c in configs if name in flatten(c.to_dict()))


def refusal(config, name, value):
    """The error message for the field's value; None if it is accepted."""
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    try:
        check_ranges(config, 1, of_method=METHODS[config.method].ranges)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_within(preset):
    config = config_of(*preset)
    check_ranges(config, 1, of_method=METHODS[config.method].ranges)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_number_has_a_range(preset):
    flat = flatten(config_of(*preset).to_dict())
    numbers = {
        name
        for name, value in flat.items()
        if isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
    }
    assert numbers - ELSEWHERE <= RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_out_of_range(name):
    low, high = RANGES[name]
    below = 0.0 if low == SMALL else low - 1
    above = {LARGE: math.inf, BELOW_1: 1.0}.get(high, high + 1)
    several = isinstance(flatten(holds(name).to_dict())[name], tuple)
    for value in (below, above, math.nan, -math.inf):
        given = (low, value, low)[: 2 + several] if several else value
        line = refusal(holds(name), name, given)
        assert line.startswith(f"{name}=")
        assert ", expected " in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model.mask_ratio", 1.0, "mask_ratio=1.0, expected above 0 and below 1"),
        ("model.mask_ratio", 0.0, "mask_ratio=0.0, expected above 0 and below 1"),
        (
            "model.dtype",
            "float64",
            "dtype=float64, expected one of float32, bfloat16",
        ),
        ("model.num_heads", 5, "model.num_heads=5: change one of them"),
        ("model.decoder_num_heads", 7, "multiple of model.decoder_num_heads=7"),
        ("loss.contrastive.groups", 5, "loss.contrastive.groups=5"),
        ("views.area", (0.0, 1.0), "views.area=(0.0, 1.0), expected above 0 and at"),
        ("optim.b2", 1.0, "optim.b2=1.0, expected 0 or more and below 1"),
        ("std", (0.2, 0.0, 0.2), "std=(0.2, 0.0, 0.2), expected above 0"),
        ("num_steps", 0, "num_steps=0, expected 1 or more"),
        ("loss.contrastive.weight", -1.0, "weight=-1.0, expected 0 or more"),
        ("batch_size", True, "batch_size=True, expected 1 or more"),
        ("views.size", 100, "not a multiple of model.patch_size"),
        ("optim.accumulation_steps", 3, "optim.accumulation_steps=3 times"),
        ("model.reference_gsd", None, "model.reference_gsd is not set"),
        ("mean", (0.5, 0.5), "has 2 values, expected 3"),
        ("std", (0.5,) * 4, "has 4 values, expected 3, one per band in bands=red,"),
        (
            "bands",
            ("red", "nir"),
            "has 3 values, expected 2, one per band in bands=red",
        ),
    ],
)
def test_what_is_said(name, value, expected):
    assert expected in refusal(config_of(), name, value)


def test_a_run_that_would_learn_nothing():
    config = config_of("published", "mae")
    line = refusal(config, "loss.reconstruction.weight", 0.0)
    assert "every weight in config.loss is 0 (reconstruction)" in line


def decoder_of(*argument, **defaults):
    config = common.get_common(**common.parse_argument(*argument, **defaults))
    model = config.model
    sizes = model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads
    return sizes, config


@pytest.mark.parametrize("size", ["tiny", "small", "base", "huge"])
@pytest.mark.parametrize("method", ["corrected", "mae", "sat_mae", "scale_mae"])
def test_the_small_decoder(method, size):
    """It changes the decoder and what depends on its width, and nothing else."""
    published = (128, 4, 4) if size == "tiny" else (512, 8, 16)
    if method == "scale_mae":
        published = (published[0], 3, published[2])
    sizes, before = decoder_of(f"{method},size={size}")
    assert sizes == published
    sizes, config = decoder_of(f"{method},size={size},decoder=small")
    assert sizes == ((64, 1, 4) if size == "tiny" else (256, 2, 8))
    before, after = flatten(before.to_dict()), flatten(config.to_dict())
    changed = {name for name in after if after[name] != before[name]}
    own = {"corrected": {"predictor_hidden_dim"}, "sat_mae": {"decoder_group_dim"}}
    known = {"decoder_embed_dim", "decoder_depth", "decoder_num_heads"}
    known |= own.get(method, set())
    assert changed <= {f"model.{name}" for name in known}
    assert "model.decoder_depth" in changed


def test_a_method_of_our_own_takes_the_small_decoder():
    assert decoder_of("scale_distill")[0] == (256, 2, 8)
    assert decoder_of("scale_distill,decoder=published")[0] == (512, 8, 16)


def test_flags_win_over_the_small_decoder():
    words = ["--config=fmow:mae,decoder=small", "--config.model.decoder_depth=5"]
    model = parse(["xsmae", *words], pretrain.define_flags).config.model
    assert (model.decoder_embed_dim, model.decoder_depth) == (256, 5)
    with pytest.raises(UserError, match="decoder='tiny', expected one of published, s"):
        decoder_of("mae,decoder=tiny")
