"""Encoders in memory: random ones, saved ones, other dtypes, digests, the GSD range."""

import hashlib
import json
import warnings

import numpy as np
import pytest

from tests.test_encoder import (
    MEAN,
    MODEL,
    SIZE,
    STD,
    build,
    edit_json,
    loaded,
    refused,
    some_images,
    write,
)  # fmt: skip
from xsmae.bands import BANDS, Bands
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder, load_encoder

READ = Bands(BANDS, MEAN, STD)


def described(**fields):
    return describe_encoder(
        MODEL, **{"image_size": SIZE, "bands": READ, "run": {}} | fields
    )


def test_saved_and_loaded_it_is_the_same(tmp_path):
    made = Encoder.random(described(), seed=3)
    made.save(tmp_path / "one")
    found = load_encoder(tmp_path / "one")
    assert found.info == made.info
    assert found.digest == made.digest
    images = some_images()
    np.testing.assert_array_equal(found(images, gsd=1.0), made(images, gsd=1.0))
    found.save(tmp_path / "two")
    one, two = (
        (tmp_path / name / "encoder.safetensors").read_bytes()
        for name in ("one", "two")
    )
    assert one == two


def test_random_encoders_differ_by_their_seed():
    encoders = [Encoder.random(described(), seed=seed) for seed in (0, 0, 1)]
    digests = [encoder.digest for encoder in encoders]
    assert digests[0] == digests[1] != digests[2]
    assert encoders[2].info["run"] == {"method": "none: random weights", "seed": 1}


def test_digest_is_that_of_the_rows_until_now(tmp_path):
    """Result rows and cached features of old runs are found by it."""
    write(tmp_path, build())
    info = json.loads((tmp_path / "encoder.json").read_text())
    # The encoder.json of those rows had no dtype: they were of uint8.
    later = ("run", "licence", "dtype", "wavelengths")
    told = {k: v for k, v in info.items() if k not in later}
    parts = [
        json.dumps(told, sort_keys=True).encode(),
        (tmp_path / "encoder.safetensors").read_bytes(),
    ]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    assert load_encoder(tmp_path).digest == whole.hexdigest()[:16]
    whole.update(hashlib.sha256(b"more").digest())
    assert load_encoder(tmp_path).digest_with(b"more") == whole.hexdigest()[:16]


def test_what_changes_no_feature_changes_no_digest(tmp_path):
    write(tmp_path, build())
    before = load_encoder(tmp_path).digest
    edit_json(tmp_path, run={"steps": 8}, licence="none", gsd_range=[0.5, 2.0])
    assert load_encoder(tmp_path).digest == before
    edit_json(tmp_path, mean=[0.1, 0.5, 0.6])
    assert load_encoder(tmp_path).digest != before


def test_bfloat16_is_near_and_another_encoder(tmp_path):
    write(tmp_path, build())
    full, half = load_encoder(tmp_path), load_encoder(tmp_path, dtype="bfloat16")
    images = some_images()
    one, other = (np.asarray(e(images, gsd=1.0)) for e in (full, half))
    assert one.dtype == other.dtype == np.float32
    assert 0 < np.abs(one - other).max() < 0.1
    assert full.digest != half.digest


def test_attention_is_chosen(tmp_path):
    write(tmp_path, build())
    images = some_images(1)
    expected = load_encoder(tmp_path)(images, gsd=1.0)
    found = load_encoder(tmp_path, attention="auto")(images, gsd=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    refused("cudnn.*NVIDIA GPU", load_encoder, tmp_path, attention="cudnn")


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"dtype": None}, {"attention": "flash"}]
)
def test_unknown_choices_are_refused(tmp_path, options):
    write(tmp_path, build())
    (name,) = options
    refused(f"{name}=.*expected one of", load_encoder, tmp_path, **options)


def test_tokens_are_pooled_as_features_are():
    encoder, images = loaded(), some_images()
    tokens = encoder.tokens(images, gsd=1.0)
    for pooling in ("cls", "mean", None):
        found = encoder.pool(tokens, pooling)
        expected = encoder(images, gsd=1.0, pooling=pooling)
        np.testing.assert_array_equal(found, expected)
    refused("pooling='max'", encoder.pool, tokens, "max")


def test_a_gsd_that_training_has_not_seen_is_said_once():
    encoder = Encoder(build(), described(gsd_range=(0.5, 2.0)))
    images = some_images(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A whole image is a little coarser than the largest crop of it.
        for gsd in (0.5, 2.0, [0.7, 1.9], 2.19, 0.46):
            encoder(images, gsd=gsd)
        build_without = Encoder(build(), described())  # as before ranges existed
        build_without(images, gsd=100.0)
    with pytest.warns(UserWarning, match="0.5 to 2 metres per pixel.* 0.4 to 3:"):
        encoder(images, gsd=[0.4, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(images, gsd=100.0)


@pytest.mark.parametrize("gsd", [0.45, 2.21])
def test_a_gsd_is_outside_from_a_tenth_on(gsd):
    encoder = Encoder(build(), described(gsd_range=(0.5, 2.0)))
    with pytest.warns(UserWarning, match=f"0.5 to 2 metres per pixel.* {gsd}:"):
        encoder(some_images(2), gsd=gsd)


def test_its_repr_says_what_it_reads():
    assert repr(loaded()) == (
        "Encoder(16 wide, 2 deep, patch 4, bands red, green, blue)"
    )


def test_a_random_control_has_seen_no_gsd():
    control = Encoder.random(described(gsd_range=(0.5, 2.0)), seed=0)
    assert "gsd_range" not in control.info


@pytest.mark.parametrize("value", [[2, 1], [1], "x", [0, 1], [1, None], [True, 2]])
def test_a_broken_range_is_refused(tmp_path, value):
    write(tmp_path, build())
    edit_json(tmp_path, gsd_range=value)
    refused("gsd_range=.*expected .smallest, largest", load_encoder, tmp_path)
