"""Weights of other bands: official SatMAE on 13 bands, by name; what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xsmae.configs import common

import xsmae
from tests.support.rasters import REASON, land, write
from xsmae import load_config
from xsmae.data.pipeline import check_bands
from xsmae.data.sensors import SENSORS
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.run.choices import settle
from xsmae.weights.band_matching import Layout, describe_match, moved
from xsmae.weights.layouts import leaves
from xsmae.weights.official import import_checkpoint
from xsmae.weights.official_bands import published_bands
from xsmae.weights.official_config import OfficialFile
from xsmae.weights.warm_start import adopt

CASES = Path(__file__).parent.parent.parent / "shared" / "parity"
OFFICIAL = CASES / "satmae_group_channels.pth"
needs_official = pytest.mark.skipif(
    not OFFICIAL.exists(), reason=f"{OFFICIAL} does not exist"
)
HEADS = {"num_heads": 4, "decoder_num_heads": 4}
SENTINEL = SENSORS["sentinel2_l1c"]
EUROSAT = SENSORS["eurosat_ms"].bands
TEN = tuple(b for b in SENTINEL.bands if b not in ("B01", "B09", "B10"))
GROUPS = (
    ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A"), ("B11", "B12"),
)  # fmt: skip
NEW = ("B01", "B09", "B10")
FILE = OfficialFile("x.pth", {}, {})


# The bands of official weights


def test_the_published_ten_bands_as_the_official_code_normalises_them():
    """SentinelNormalize maps mean - 2 std to 0 and mean + 2 std to 1."""
    bands = published_bands(FILE, "sat_mae", 10, ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9)))
    assert (bands.names, bands.dtype) == (TEN, "float32")
    assert bands.units == SENTINEL.units == SENSORS["eurosat_ms"].units
    assert bands.wavelengths[:2] == (492.4, 559.8)
    numbers = np.float32([[1184.3824625 + k * 650.2842772 for k in (-2, 0, 2)]]).T
    values = np.zeros((3, 10), np.float32)
    values[:, :1] = numbers / 10000  # as the preset gives B02
    found = bands.normalize(values)[:, 0]
    np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("saved", "channels", "expected"),
    [
        ({"dataset_type": "sentinel", "dropped_bands": [0, 9, 10]}, 10, TEN),
        ({"dataset_type": "sentinel"}, 13, SENTINEL.bands),
        ({"dataset_type": "sentinel", "dropped_bands": [10]}, 12,
         tuple(b for b in SENTINEL.bands if b != "B10")),
        ({"dataset_type": "sentinel", "dropped_bands": [0, 9]}, 10, None),
        ({"dataset_type": "mmearth", "dropped_bands": [0, 9]}, 10, None),
        ({"dropped_bands": [0, 9]}, 10, None),
        ({}, 9, None),
    ],
)  # fmt: skip
def test_saved_arguments_decide_the_bands(saved, channels, expected):
    file = OfficialFile("x.pth", {}, {}, saved)
    groups = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9)) if channels == 10 else ((0,),)
    found = published_bands(file, "sat_mae", channels, groups)
    assert (found and found.names) == expected


@needs_official
def test_an_import_says_its_bands_groups_and_units(official, capsys):
    assert xsmae.import_weights(OFFICIAL, **HEADS).bands.names == TEN
    info = json.loads((official / "encoder/encoder.json").read_text())
    assert (tuple(info["bands"]), info["dtype"]) == (TEN, "float32")
    assert info["architecture"]["channel_groups"][0] == [0, 1, 2, 6]
    assert info["units"] == "top-of-atmosphere reflectance"
    options = {"bands": TEN, "mean": (0.1,) * 10, "std": (0.2,) * 10}
    own = xsmae.import_weights(OFFICIAL, **HEADS, **options, units="counts")
    assert (own.bands.units, own.bands.mean[0]) == ("counts", 0.1)
    for wrong in ({"bands": TEN}, {"units": "counts"}):
        with pytest.raises(UserError, match=r"10 bands.*--bands.*--mean and --std"):
            xsmae.import_weights(OFFICIAL, **HEADS, **wrong)


# Runs that start from them


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The folder of an import of the official case."""
    out = tmp_path_factory.mktemp("import") / "out"
    xsmae.import_weights(OFFICIAL, out=out, **HEADS)
    return out


def config_of(init, **fields):
    """A config of 13-band data, with what the weights decide, and the lines of it."""
    config = load_config(
        "eurosat_ms:sat_mae,size=tiny",
        {"init": str(init), "batch_size": 2, "num_steps": 1, "model.dtype": "float32",
         "mean": None, "knn.every": -1, "optim.warmup_steps": 0,
         **fields},
    )  # fmt: skip
    return config, adopt(config, [n for n in fields if not n.startswith("data.")])


@needs_official
def test_13_band_data_are_read_by_the_weights_bands(official):
    config, lines = config_of(official)
    assert config.data.bands == config.bands == TEN
    assert config.units == "top-of-atmosphere reflectance"
    assert f"data.bands None -> {TEN}" in lines
    assert not any("by name" in line for line in lines)
    saved = json.loads((official / "config.json").read_text())
    layout = Layout.of(saved["model"], saved["bands"])
    assert layout.read == GROUPS
    assert Layout.of(config.model.to_dict(), config.bands) == layout


@needs_official
def test_new_bands_become_a_group_with_random_weights(official):
    config, lines = config_of(official, **{"data.bands": EUROSAT})
    assert config.bands == EUROSAT
    assert config.model.channel_groups == (*GROUPS, NEW)
    saved = json.loads((official / "config.json").read_text())
    mean = dict(zip(TEN, saved["mean"], strict=True))
    assert config.mean == tuple(mean.get(band) for band in EUROSAT)
    said = "\n".join(lines)
    assert "bands by name: B02, B03, B04, B08, B05" in said
    assert f"new, with random weights: {', '.join(NEW)} (groups 3)" in said
    config, _ = settle(config, None)
    assert (config.mean[0], config.std[0]) == (0.0, 1.0)  # to be measured


def network(method, model, *, channels, seed):
    """A network with random numbers in every array."""
    sizes = {"channels": channels, "view_size": 8}
    build = METHODS[method].build
    found = nnx.eval_shape(lambda: build(model, **sizes, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32),
        nnx.state(found),
    )
    nnx.update(found, state)
    return found


@pytest.mark.parametrize("order", ["grouped", "concatenated"])
def test_weights_move_with_the_names_of_their_bands(order):
    """Tokens and predictions of known bands stay, whatever the order of the bands."""
    old = ("a", "b", "c", "d", "e")
    new = ("b", "c", "e", "new", "a", "d")
    groups = {
        "old": (("a", "c"), ("b", "d", "e")),
        "new": (("c", "a"), ("d", "e", "b"), ("new",)),
    }
    model = common.get_common("published", "tiny", "sat_mae").model.to_dict()
    model |= {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2,
              "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
              "group_dim": 4, "decoder_group_dim": 4, "dtype": "float32",
              "band_order": order}  # fmt: skip
    layouts, networks = [], []
    for seed, (bands, name) in enumerate(((old, "old"), (new, "new"))):
        layouts.append(Layout.of(model | {"channel_groups": groups[name]}, bands))
        index = tuple(tuple(map(bands.index, group)) for group in groups[name])
        networks.append(
            METHODS["sat_mae"].build(
                model | {"channel_groups": index},
                channels=len(bands), view_size=8, rngs=nnx.Rngs(seed),
            )
        )  # fmt: skip
    before, after = networks
    initial = leaves(after)
    nnx.update(after, moved(nnx.state(before), nnx.state(after), tuple(layouts), 16))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 6)).astype(np.float32)
    images[..., new.index("new")] = 0
    same = images[..., [new.index(band) for band in old]]
    found, expected = (
        after.encoder.patch_embed(images),
        before.encoder.patch_embed(same),
    )
    np.testing.assert_allclose(found[:, :8], expected, atol=1e-5)
    tokens = np.random.default_rng(1).normal(size=(2, 12, 16)).astype(np.float32)
    one = np.asarray(before.decoder.head(tokens[:, :8], grid=(2, 2)))
    other = np.asarray(after.decoder.head(tokens, grid=(2, 2)))
    one, other = (x.reshape(2, 4, 16, -1) for x in (one, other))
    moved_bands = {
        band
        for here, there in zip(*(x.predicted for x in layouts), strict=False)
        for band in {*here} & {*there}
    }
    assert moved_bands == ({*old} if order == "grouped" else {"b", "e"})
    for band in moved_bands:
        np.testing.assert_allclose(
            other[..., new.index(band)], one[..., old.index(band)], atol=1e-5
        )
    path = ("encoder", "patch_embed", "groups", 2, "proj", "kernel")
    np.testing.assert_array_equal(leaves(after)[path], initial[path])
    said = describe_match(*layouts)
    assert "random weights: new (groups 2)" in said
    assert ("decoder's last layer" in said) == (order == "concatenated")


def test_without_groups_the_one_embedding_is_matched():
    model = common.get_common("published", "tiny", "mae").model.to_dict()
    model |= {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2,
              "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
              "dtype": "float32"}  # fmt: skip
    before, after = (network("mae", model, channels=n, seed=n) for n in (3, 2))
    layouts = Layout.of(model, ("r", "g", "b")), Layout.of(model, ("nir", "g"))
    nnx.update(after, moved(nnx.state(before), nnx.state(after), layouts, 16))
    images = np.zeros((1, 8, 8, 3), np.float32)
    images[..., 1] = 0.7
    found = after.encoder.patch_embed(images[..., :2])
    np.testing.assert_allclose(found, before.encoder.patch_embed(images), atol=1e-6)
    assert describe_match(*layouts) == (
        "bands by name: g; new, with random weights: nir; not used: r, b"
    )


@needs_official
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"model.channel_groups": (NEW, *GROUPS), "data.bands": SENTINEL.bands},
            r"group 1 .*B02.*of group 0 .*behind them",
        ),
        (
            {"model.channel_groups": (("B02", "B03", "B04", "B08", "B11"),
                                      ("B05", "B06", "B07", "B8A"), ("B12",))},
            r"group 0 .*B11.*of group 2",
        ),
        (
            {"model.channel_groups": (("B02", "B99"),)},
            r"names 'B99', expected .*B02",
        ),
    ],
)  # fmt: skip
def test_moved_groups_are_refused(fields, expected, official):
    with pytest.raises(UserError, match=expected):
        config_of(official, **fields)


def test_methods_that_cannot_be_fitted_and_other_values_are_refused(tmp_path):
    saved = {"method": "scale_mae", "dtype": "float32", "model": {}, "bands": ["a"],
             "mean": [0], "std": [1]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(saved))
    fields = {"init": str(tmp_path), "data.bands": ("b",)}
    config = load_config("geotiff:scale_mae,size=tiny", fields)
    with pytest.raises(UserError, match=r"bands a, but .* b.*data.bands.*mae"):
        adopt(config, ())


@needs_official
def test_pretraining_goes_on_from_ten_bands_on_thirteen(official, tmp_path):
    """A run of 13-band rasters: units are checked, and new bands are measured."""
    pytest.importorskip("rasterio", reason=REASON)
    data = (land(64, 64, bands=13).astype(np.uint16) * 20).clip(1)
    (tmp_path / "data/a").mkdir(parents=True)
    for i in range(3):
        write(tmp_path / f"data/a/{i}.tif", data + np.uint16(i))
    fields = {
        "init": str(official), "data.root": str(tmp_path / "data"), "batch_size": 2,
        "num_steps": 1, "views.size": 48, "knn.every": -1, "figures.every": 0,
        "optim.warmup_steps": 0, "data.bands": EUROSAT, "optim.learning_rate": 1e-30,
    }  # fmt: skip
    config = load_config("eurosat_ms:sat_mae,size=tiny", fields)
    workdir = xsmae.pretrain(config, tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    imported = json.loads((official / "config.json").read_text())
    place = EUROSAT.index
    assert saved["mean"][place("B02")] == imported["mean"][0]
    values = data[place("B01")].mean() / 10000
    assert saved["mean"][place("B01")] == pytest.approx(values, rel=0.01)
    encoder = xsmae.load_encoder(workdir)
    assert encoder.bands.wavelengths[place("B8A")] == 864.7
    found = leaves(encoder.network)
    expected = leaves(import_checkpoint(OFFICIAL, **HEADS).network.encoder)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
    fresh = found["patch_embed", "groups", 3, "proj", "kernel"]
    assert fresh.shape == (64 * 3, 96)


@needs_official
def test_values_of_another_kind_are_refused(official, tmp_path):
    pytest.importorskip("rasterio", reason=REASON)
    data = land(64, 64, bands=12, dtype="uint16")
    (tmp_path / "a").mkdir()
    write(tmp_path / "a/0.tif", data)
    fields = {"data.root": str(tmp_path), "data.sensor": "sentinel2_l2a"}
    config, _ = config_of(official, **fields)
    with pytest.raises(UserError, match=r"'top-of-atmosphere.*'surface reflectance'"):
        check_bands(xsmae.open_source(config), config)
