"""timm's VisionTransformer loads our exports. `make test-peers` runs this."""

import importlib.machinery
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from tests.support.encoders import make_encoder
from tests.support.peers import assert_close, tokens_of
from xsmae.weights.export import export

TORCHVISION = ("", ".datasets", ".models", ".ops", ".ops.misc", ".transforms")


@pytest.fixture(scope="module")
def timm():
    """With an empty torchvision, unless there is one.

    Importing timm needs torchvision's names, of image transforms and of detection; no
    ViT uses one. torchvision's wheel needs CUDA's build of torch, which is 3 GB.
    """
    patch = {}
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name in (*TORCHVISION, ".transforms.functional"):
            module = mock.MagicMock()
            name = f"torchvision{name}"
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            patch[name] = module
    with mock.patch.dict(sys.modules, patch):
        return pytest.importorskip("timm")


def created(timm, out, **options):
    """The model; timm raises where a weight is missing, left over or mis-shaped."""
    return timm.create_model(f"local-dir:{out}", pretrained=True, **options).eval()


CASES = [
    ({}, {}, {}),
    ({"embed_dim": 32, "num_heads": 4, "depth": 3}, {}, {"image_size": 24}),
    ({"encoder_norm": False}, {}, {}),
    ({"position": "gsd"}, {"gsd": 0.5}, {}),
]


@pytest.mark.parametrize(("changes", "gsd", "size"), CASES)
def test_our_exports(changes, gsd, size, timm, tmp_path):
    source, out = make_encoder(tmp_path / "source", **changes), tmp_path / "out"
    export(source, out, format="timm", **gsd, **size)
    images, expected = tokens_of(source, size.get("image_size", 16), **gsd)
    expected = np.asarray(expected)
    model = created(timm, out)
    with torch.no_grad():
        assert_close(model.forward_features(images), expected)
        # As encoder.json says: the mean of the patches' tokens.
        assert_close(model(images), expected[:, 1:].mean(axis=1))
        of_class_token = created(timm, out, global_pool="token")
        assert_close(of_class_token(images), expected[:, 0])


def test_other_bands(timm, tmp_path):
    bands, out = ("red", "nir", "swir1", "swir2"), tmp_path / "out"
    source = make_encoder(tmp_path / "source", bands=bands)
    export(source, out, format="timm")
    images, expected = tokens_of(source, 16, bands=4)
    with torch.no_grad():
        assert_close(created(timm, out).forward_features(images), expected)


def test_a_classifier_starts_from_it(timm, tmp_path):
    source, out = make_encoder(tmp_path / "source"), tmp_path / "out"
    export(source, out, format="timm")
    images, _ = tokens_of(source, 16)
    model = created(timm, out, num_classes=5)
    assert model(images).shape == (len(images), 5)


def test_what_the_data_should_be(timm, tmp_path):
    source, out = make_encoder(tmp_path / "source"), tmp_path / "out"
    export(source, out, format="timm")
    config = timm.data.resolve_data_config(model=created(timm, out))
    assert config["input_size"] == (3, 16, 16)
    assert config["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert config["std"] == pytest.approx((0.2, 0.2, 0.2))
