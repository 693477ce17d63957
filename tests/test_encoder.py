"""The trained encoder: timm's names, the round trip, every error."""

import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import xsmae
from xsmae.bands import BANDS, Bands
from xsmae.errors import UserError
from xsmae.models.build import build_encoder
from xsmae.models.position import patch_positions
from xsmae.weights.description import describe_encoder, to_timm
from xsmae.weights.encoder import Encoder, load_encoder

MODEL = {
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "norm_style": "pre",
    "norm_epsilon": 1e-5,
    "encoder_norm": True,
    "position": "gsd",
    "reference_gsd": 0.5,
    "dtype": "float32",
    "attention": "xla",
    "remat": "none",
    "scan": True,
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = 12


@functools.cache
def build(**changes):
    """An encoder without parameters of 0 or 1, as after training."""
    encoder = build_encoder({**MODEL, **changes}, channels=3, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(encoder)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), state)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), state))


@nnx.jit
def apply(encoder, images, gsd=None):
    return encoder(images, gsd=gsd)


def write(directory, encoder, **changes):
    described = describe_encoder(
        {**MODEL, **changes},
        image_size=SIZE,
        bands=Bands(BANDS, MEAN, STD),
        run={"steps": 7},
    )
    Encoder(encoder, described).save(directory)


@pytest.fixture
def folder(tmp_path):
    """The `encoder/` of a run."""
    write(tmp_path / "encoder", build())
    return tmp_path / "encoder"


@functools.cache
def loaded(**changes):
    """A loaded encoder without files, for tests that only read it."""
    info = {
        "architecture": {**MODEL, **changes},
        "bands": ["red", "green", "blue"],
        "mean": MEAN,
        "std": STD,
        "pooling": "mean",
    }
    return Encoder(build(**changes), info)


def some_images(batch=3, height=SIZE, width=SIZE):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (batch, height, width, 3), np.uint8)


def normalised(images):
    mean, std = np.array([[[MEAN]]]), np.array([[[STD]]])
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


def refused(match, call, *args, **kwargs):
    """Assert a one-line UserError."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def edit_json(folder, **changes):
    path = folder / "encoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The round trip


@pytest.mark.parametrize(
    ("norm_style", "position", "encoder_norm"),
    [
        ("pre", "gsd", True),
        ("pre", "fixed", False),
        ("post", "gsd", False),
        ("post", "fixed", True),
    ],
)
def test_round_trip(tmp_path, norm_style, position, encoder_norm):
    changes = {
        "norm_style": norm_style,
        "position": position,
        "encoder_norm": encoder_norm,
    }
    encoder = build(**changes)
    write(tmp_path / "encoder", encoder, **changes)
    images, gsd = some_images(), np.array([[0.3, 0.4], [1, 1], [2, 3]], np.float32)
    expected = apply(encoder, normalised(images), jnp.asarray(gsd))
    found = load_encoder(tmp_path)
    tokens = found.tokens(images, gsd=gsd)
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found(images, gsd=gsd, pooling="cls"), tokens[:, 0])
    mean = np.asarray(tokens)[:, 1:].mean(axis=1)
    for pooling in ("mean", None):
        features = found(images, gsd=gsd, pooling=pooling)
        np.testing.assert_allclose(features, mean, rtol=1e-5, atol=1e-6)


def test_what_is_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
    ]
    info = json.loads((folder / "encoder.json").read_text())
    assert info["schema"] == 1
    assert info["bands"] == ["red", "green", "blue"]
    assert (info["mean"], info["std"]) == (list(MEAN), list(STD))
    assert info["architecture"]["reference_gsd"] == 0.5
    assert info["architecture"]["norm_epsilon"] == 1e-5
    assert info["image_size"] == SIZE
    assert info["run"] == {"steps": 7}
    assert info["pooling"] == "mean"
    assert info["units"] == "digital numbers 0-255 divided by 255"


def test_writing_again_replaces(folder):
    encoder = build_encoder(MODEL, channels=3, rngs=nnx.Rngs(5))
    write(folder, encoder)
    assert len(list(folder.iterdir())) == 2
    tensors = load_file(folder / "encoder.safetensors")
    np.testing.assert_array_equal(tensors["cls_token"], encoder.cls_token[...])


def test_workdir_and_folder_and_text_are_taken(folder):
    for place in (folder, folder.parent, str(folder), str(folder.parent)):
        assert load_encoder(place).info["run"] == {"steps": 7}


# timm


def test_names_and_shapes_are_timms(folder):
    """The shapes of timm.models.VisionTransformer(img_size=12, patch_size=4, ...)."""
    block = {
        "norm1.weight": (16,),
        "norm1.bias": (16,),
        "attn.qkv.weight": (48, 16),
        "attn.qkv.bias": (48,),
        "attn.proj.weight": (16, 16),
        "attn.proj.bias": (16,),
        "norm2.weight": (16,),
        "norm2.bias": (16,),
        "mlp.fc1.weight": (48, 16),
        "mlp.fc1.bias": (48,),
        "mlp.fc2.weight": (16, 48),
        "mlp.fc2.bias": (16,),
    }
    tensors = load_file(folder / "encoder.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 10, 16),
        "patch_embed.proj.weight": (16, 3, 4, 4),
        "patch_embed.proj.bias": (16,),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        **{f"blocks.1.{name}": shape for name, shape in block.items()},
        "norm.weight": (16,),
        "norm.bias": (16,),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_pos_embed_is_zero_for_the_class_token_then_the_grids():
    found = to_timm(build(), MODEL, grid=(2, 3))["pos_embed"]
    np.testing.assert_array_equal(found[0, 0], 0)
    np.testing.assert_array_equal(found[0, 1:], patch_positions((2, 3), 16)[0])


def test_patch_embedding_is_a_convolution():
    encoder = build()
    tensors = to_timm(encoder, MODEL, grid=(1, 1))
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    weight, bias = (tensors[f"patch_embed.proj.{n}"] for n in ("weight", "bias"))
    expected = np.empty((2, 2, 3, 16))
    for row in range(2):
        for column in range(3):
            patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            conv = np.einsum("bpqc,dcpq->bd", patch, weight)
            expected[:, row, column] = conv + bias
    found = encoder.patch_embed(jnp.asarray(images))
    np.testing.assert_allclose(found, expected.reshape(2, 6, 16), rtol=1e-4, atol=1e-5)


def timm_forward(tensors, patches, heads, epsilon):
    """timm's pre-norm VisionTransformer in NumPy, from embedded patches to tokens."""
    erf = np.vectorize(math.erf)

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name, epsilon):
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    cls_token = np.broadcast_to(tensors["cls_token"], (len(patches), 1, 16))
    x = np.concatenate([cls_token, patches], axis=1) + tensors["pos_embed"]
    batch, count, width = x.shape
    for block in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{block}.norm1", epsilon), f"{block}.attn.qkv")
        qkv = qkv.reshape(batch, count, 3, heads, width // heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // heads))
        attended = (scores / scores.sum(-1, keepdims=True)) @ v
        attended = attended.transpose(0, 2, 1, 3).reshape(batch, count, width)
        x = x + linear(attended, f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2", epsilon), f"{block}.mlp.fc1")
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm", 1e-6)


def test_the_weights_mean_what_they_mean_in_timm():
    encoder = build(position="fixed")
    tensors = to_timm(encoder, MODEL, grid=(3, 3))
    images = normalised(some_images())
    patches = np.asarray(encoder.patch_embed(images))
    expected = timm_forward(tensors, patches, heads=2, epsilon=1e-5)
    np.testing.assert_allclose(apply(encoder, images), expected, rtol=1e-3, atol=1e-4)


# Images and GSD


def test_bytes_and_fractions_agree():
    images = some_images()
    expected = loaded()(images, gsd=1.0)
    for kind, tolerance in ((np.float32, 1e-5), (np.float64, 1e-5), (np.float16, 0.05)):
        found = loaded()((images / 255).astype(kind), gsd=1.0)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_gsd_for_all_per_image_and_per_axis():
    images = some_images(2)
    each = [loaded().tokens(images[i : i + 1], gsd=g) for i, g in ((0, 0.4), (1, 3.0))]
    expected = np.concatenate(each)
    per_axis = [[0.4, 0.4], [3.0, 3.0]]
    for gsd in ([0.4, 3.0], np.array([[0.4], [3.0]]), per_axis, jnp.array(per_axis)):
        found = loaded().tokens(images, gsd=gsd)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    one = loaded().tokens(images, gsd=0.4)
    np.testing.assert_allclose(one[0], expected[0], rtol=1e-5, atol=1e-5)
    assert np.abs(one[1] - expected[1]).max() > 1e-3
    tall, wide = (loaded().tokens(images, gsd=[g] * 2) for g in ((2, 1), (1, 2)))
    assert np.abs(tall - wide).max() > 1e-3


def test_fixed_positions_read_no_gsd():
    images = some_images()
    fixed = loaded(position="fixed")
    np.testing.assert_array_equal(fixed(images), fixed(images, gsd=7.0))


def test_larger_and_oblong_images():
    images = some_images(2, 20, 8)
    tokens = loaded().tokens(images, gsd=1.0)
    assert tokens.shape == (2, 1 + 5 * 2, 16)
    expected = apply(build(), normalised(images), jnp.ones((2, 2)))
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 12, 12, 4), np.uint8), r"\(2, 12, 12, 4\).* red, green, blue"),
        (np.zeros((2, 3, 12, 12), np.uint8), r"\(2, 3, 12, 12\), expected \[batch"),
        (np.zeros((12, 12, 3), np.uint8), r"\(12, 12, 3\), expected"),
        (np.zeros((2, 13, 12, 3), np.uint8), "13x12 px, expected multiples.* 4"),
        (np.zeros((0, 12, 12, 3), np.uint8), r"shape \(0, 12, 12, 3\), expected"),
        (np.zeros((2, 0, 12, 3), np.uint8), r"shape \(2, 0, 12, 3\), expected"),
        (np.zeros((2, 12, 12, 3), np.int32), "dtype int32"),
        (np.zeros((2, 12, 12, 3), np.uint16), "dtype uint16"),
        (np.zeros((2, 12, 12, 3), bool), "dtype bool"),
        (np.full((2, 12, 12, 3), 200.0), "from 200 to 200"),
        (np.full((2, 12, 12, 3), 1.01), "to 1.01"),
        (np.full((2, 12, 12, 3), -0.5), "from -0.5"),
        (np.full((2, 12, 12, 3), np.nan), "nan"),
    ],
)
def test_wrong_images_are_refused(images, said):
    refused(said, loaded(), images, gsd=1.0)


@pytest.mark.parametrize(
    ("gsd", "said"),
    [
        (None, "gsd is missing.*gsd=METRES per pixel"),
        (0, "gsd=0"),
        (-1.0, "gsd=-1"),
        (math.nan, "gsd=nan"),
        (math.inf, "gsd=inf"),
        ("ten metres", "gsd='ten metres'"),
        ([1.0, 0.0, 1.0], "gsd=0"),
        ([1.0, None, 1.0], "gsd="),
        ([1.0] * 2, r"gsd of shape \(2,\) for 3 images"),
        (np.ones((3, 3)), r"gsd of shape \(3, 3\)"),
        (np.ones((3, 2, 1)), r"gsd of shape \(3, 2, 1\)"),
        (np.where(np.arange(3000) == 2500, np.nan, 1.0), "gsd=nan"),
    ],
)
def test_wrong_gsd_is_refused(gsd, said):
    refused(said, loaded(), some_images(3), gsd=gsd)


def test_unknown_pooling_is_refused():
    refused("pooling='max', expected", loaded(), some_images(), gsd=1.0, pooling="max")


# Files


def test_missing_folder_and_files(tmp_path, folder):
    refused("no encoder.json", load_encoder, tmp_path / "elsewhere")
    (folder / "encoder.safetensors").unlink()
    refused(f"{folder} cannot be read: .*safetensors", load_encoder, folder)
    (folder / "encoder.json").unlink()
    refused("no encoder.json", load_encoder, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -50])
def test_truncated_weights(folder, keep):
    path = folder / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(f"{folder} cannot be read", load_encoder, folder)


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, ', b"\xff\xfe\x00", b"[]"])
def test_broken_json(folder, content):
    (folder / "encoder.json").write_bytes(content)
    refused("encoder", load_encoder, folder)


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_other_schema(folder, schema):
    edit_json(folder, schema=schema)
    refused(f"schema {schema!r}, expected 1", load_encoder, folder)


def test_missing_field(folder):
    info = json.loads((folder / "encoder.json").read_text())
    for path in (["mean"], ["architecture"], ["architecture", "depth"]):
        broken = json.loads(json.dumps(info))
        place = broken if len(path) == 1 else broken[path[0]]
        del place[path[-1]]
        (folder / "encoder.json").write_text(json.dumps(broken))
        refused(rf"encoder.json.*'{path[-1]}'", load_encoder, folder)


def test_other_number_of_bands(folder):
    edit_json(folder, bands=["red", "green", "blue", "nir"])
    refused("3 values of mean, expected 4", load_encoder, folder)
    edit_json(folder, bands=["red", "green", "blue"], mean=[0.5])
    refused("1 values of mean, expected 3", load_encoder, folder)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"depth": 3}, r"blocks\.2\.norm1\.weight: expected \(16,\), found nothing"),
        ({"patch_size": 2}, r"patch_embed\.proj\.weight: expected \(16, 3, 2, 2\)"),
        ({"mlp_ratio": 4.0}, r"blocks\.0\.mlp\.fc1\.bias: expected \(64,\)"),
    ],
)
def test_weights_of_another_architecture(folder, architecture, said):
    edit_json(folder, architecture={**MODEL, **architecture})
    refused(said, load_encoder, folder)


def test_tampered_tensor_is_named(folder):
    path = folder / "encoder.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.attn.qkv.weight"] = tensors["blocks.1.attn.qkv.weight"].T.copy()
    save_file(tensors, path)
    said = (
        r"the weights do not fit the network: blocks\.1\.attn\.qkv\.weight: "
        r"expected \(48, 16\), found \(16, 48\)$"
    )
    refused(said, load_encoder, folder)


# Imports


def imports(statement, *blocked):
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in blocked)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {blocks or 'pass'}; {statement}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_core_imports_with_jax_and_flax_alone():
    imports(
        "import xsmae.models.cross_scale_mae, xsmae.ops.attention.api, xsmae.losses, "
        "xsmae.methods, xsmae.train_state",
        "grain",
        "PIL",
        "ml_collections",
        "tensorflow_datasets",
        "orbax",
        "matplotlib",
        "safetensors",
        "jaxtyping",
        "tensorboardX",
    )


def test_load_encoder_is_exported_lazily():
    imports(
        "import xsmae; assert 'jax' not in sys.modules; "
        "assert xsmae.load_encoder.__module__ == 'xsmae.weights.encoder'"
    )
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = xsmae.load_decoder
