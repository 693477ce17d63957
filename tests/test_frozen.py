"""What `--encoder` names: exported encoders, workdirs, checkpoints, controls."""

import json
import shutil

import ml_collections
import numpy as np
import pytest
from xsmae.configs import common

import xsmae
from tests.support.runs import SMALL_RUN
from tests.support.runs import call as pretrain
from xsmae.data.catalogue import build_source
from xsmae.errors import UserError
from xsmae.evaluation.subjects import open_encoder, random_encoder
from xsmae.trainer import batches_of, create_sampler


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small finished run with checkpoints at the steps 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    config = "--config=configs/quickstart.py:corrected,size=tiny"
    flags = [*SMALL_RUN, "--config.knn.every=-1", "--config.tensorboard=False"]
    assert pretrain(config, f"--workdir={workdir}", *flags) == 0
    return workdir


@pytest.fixture
def config():
    config = common.get_common("corrected", "base")
    config.model.update(patch_size=8, reference_gsd=2.0)
    return config


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
GSD = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], np.float32)


def test_every_way_to_an_encoder_gives_its_features(workdir, config):
    tokens = np.asarray(xsmae.load_encoder(workdir).tokens(IMAGES, gsd=GSD))
    names, digests = [], set()
    for text in (workdir, workdir / "encoder", workdir / "checkpoints" / "8"):
        found = open_encoder(str(text), config=config)
        names.append(found.name)
        digests.add(found.digest)
        features = found.encode(IMAGES, GSD)
        np.testing.assert_array_equal(features["cls"], tokens[:, 0])
        np.testing.assert_allclose(features["mean"], tokens[:, 1:].mean(1), rtol=1e-5)
        assert found.kind == "encoder"
        assert found.patch_size == 8
        assert found.reads_gsd
        assert found.origin["path"] == str(text)
    assert names == ["small", "small", "small@8"]
    assert len(digests) == 1


def test_a_checkpoint_is_loaded_as_the_exported_encoder_is(workdir):
    exported = xsmae.load_encoder(workdir)
    found = xsmae.load_encoder(str(workdir / "checkpoints" / "8"), dtype="bfloat16")
    assert found.info["run"]["steps"] == exported.info["run"]["steps"] == 8
    assert {**found.info, "run": 0} == {**exported.info, "run": 0}
    assert found.dtype == "bfloat16"
    earlier = xsmae.load_encoder(workdir / "checkpoints" / "3")
    assert earlier.info["run"]["steps"] == 3


def test_the_gsd_range_is_that_of_the_crops(workdir):
    """The GSD range of the run's batches, drawn again outside the run."""
    config = ml_collections.ConfigDict(
        json.loads((workdir / "config.json").read_text())
    )
    source = build_source(config.data)
    batches = batches_of(config, source, create_sampler(config), 0, config.num_steps)
    gsd = np.stack([batch["gsd"] for batch in batches])
    for step, encoder in ((8, workdir), (3, workdir / "checkpoints" / "3")):
        found = xsmae.load_encoder(encoder).info["gsd_range"]
        assert found == [gsd[:step].min(), gsd[:step].max()]


def test_an_earlier_checkpoint_is_another_encoder(workdir, config):
    last, earlier = (
        open_encoder(str(workdir / "checkpoints" / step), config=config)
        for step in ("8", "3")
    )
    assert last.digest != earlier.digest
    one, other = (x.encode(IMAGES, GSD)["cls"] for x in (last, earlier))
    assert np.abs(one - other).max() > 1e-3


def test_looking_at_a_checkpoint_changes_nothing(workdir, config):
    def content():
        files = sorted(p for p in workdir.rglob("*") if p.is_file())
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

    before = content()
    open_encoder(str(workdir / "checkpoints" / "6"), config=config)
    assert content() == before


# After a failed read, Orbax leaves its cancelled reads to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_opened(workdir, config, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(workdir, unfinished)
    shutil.rmtree(unfinished / "encoder")
    said = "give .*/checkpoints/STEP with STEP one of 3, 6, 8"
    for text in (unfinished, unfinished / "checkpoints" / "7"):
        with pytest.raises(UserError, match=said):
            open_encoder(str(text), config=config)
    with pytest.raises(UserError, match=r"no encoder\.json and no checkpoints"):
        open_encoder(str(tmp_path), config=config)
    saved = json.loads((unfinished / "config.json").read_text())
    saved["model"]["embed_dim"] = 32
    (unfinished / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="cannot be restored") as caught:
        open_encoder(str(unfinished / "checkpoints" / "8"), config=config)
    assert "\n" not in str(caught.value)
    (unfinished / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        open_encoder(str(unfinished / "checkpoints" / "8"), config=config)


def test_random_encoders_are_seeded(config):
    text = "random:tiny,depth=1,norm_style=post"
    found = [open_encoder(text, config=config, seed=seed) for seed in (0, 0, 1)]
    digests = [encoder.digest for encoder in found]
    assert digests[0] == digests[1] != digests[2]
    shape = found[0].info["architecture"]
    assert (shape["embed_dim"], shape["depth"], shape["patch_size"]) == (192, 1, 8)
    assert shape["norm_style"] == "post"
    assert shape["reference_gsd"] == 2.0
    assert found[0].encode(IMAGES, GSD)["mean"].shape == (3, 192)


def test_the_random_control_differs_in_its_weights_alone(workdir, config):
    trained = open_encoder(str(workdir), config=config)
    control = random_encoder(trained.info, seed=0)
    assert control.kind == "random"
    for name in ("architecture", "mean", "std", "bands", "image_size"):
        assert control.info[name] == trained.info[name]
    one, other = (x.encode(IMAGES, GSD)["mean"] for x in (trained, control))
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 1e-3


def test_controls_from_pixels(config):
    thumbnail = open_encoder("thumbnail", config=config)
    found = thumbnail.encode(IMAGES, GSD)["thumbnail"].reshape(3, 8, 8, 3)
    expected = IMAGES.reshape(3, 8, 2, 8, 2, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(found, expected, atol=1 / 255)
    statistics = open_encoder("statistics", config=config, name="mine")
    assert statistics.encode(IMAGES, GSD)["statistics"].shape == (3, 12)
    assert statistics.name == "mine"
    assert statistics.standardize
    assert not statistics.reads_gsd


def test_a_size_without_reference_gsd_is_refused(config):
    config.model.reference_gsd = 0.0
    with pytest.raises(UserError, match=r"reference_gsd=METRES.*position=fixed"):
        open_encoder("random:tiny", config=config)
    found = open_encoder("random:tiny,position=fixed", config=config)
    assert not found.reads_gsd


def test_bands_that_images_lack_are_refused_or_at_their_mean(config):
    """An encoder with another order of bands, and with one that images lack."""
    config.bands = ("near_infrared", "blue", "red", "green")
    config.mean, config.std = (0.6, 0.3, 0.1, 0.2), (0.1, 0.2, 0.3, 0.4)
    text = "random:tiny,depth=1"
    with pytest.raises(UserError, match=r"--missing_bands=mean .* the other 1 "):
        open_encoder(text, config=config)
    found = open_encoder(text, config=config, missing_bands="mean")
    assert found.filled == ("near_infrared",)
    assert "near_infrared at their mean" in found.normalization
    features = found.encode(IMAGES, GSD)["mean"]
    whole = np.stack(
        [np.full(IMAGES.shape[:3], 0.6), *(IMAGES[..., i] / 255 for i in (2, 0, 1))], -1
    )
    normal = (whole - config.mean) / np.array(config.std)
    tokens = found.network(normal.astype(np.float32), gsd=GSD)
    np.testing.assert_allclose(features, tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    config.bands = ("near_infrared", "blue", "red", "swir")
    with pytest.raises(UserError, match="expected an encoder with green"):
        open_encoder(text, config=config, missing_bands="mean")
