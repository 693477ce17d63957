"""Encoders: a fake one, a random tiny one, and one on disk with random weights."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from xsmae.configs import common

from xsmae.bands import Bands
from xsmae.evaluation.subjects import FrozenEncoder, open_encoder
from xsmae.models.build import build_encoder
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder
from xsmae.weights.layouts import leaves

MODEL = {
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "norm_style": "pre",
    "norm_epsilon": 1e-6,
    "encoder_norm": True,
    "position": "fixed",
    "reference_gsd": 2.0,
    "attention": "xla",
    "remat": "none",
    "scan": True,
    "dtype": "float32",
}


def mean_colour(images, gsd):
    colour = images.mean(axis=(1, 2)) - images.mean(axis=(1, 2, 3))[:, None]
    return {"cls": colour, "mean": colour}


def counting_encoder(calls, fail_after=None, encode=mean_colour):
    def counted(images, gsd):
        if len(calls) == fail_after:
            raise KeyboardInterrupt  # stops like a kill
        calls.append(np.array(gsd))
        return encode(images, gsd)

    return FrozenEncoder(
        name="counting", kind="encoder", digest="0" * 16, origin={},
        info={"mean": [0], "std": [1]}, features=("cls", "mean"), patch_size=1,
        reads_gsd=True, standardize=False, encode=counted,
    )  # fmt: skip


@functools.cache
def tiny_encoder(depth=3):
    config = common.get_common("corrected", "tiny")
    config.model.update(patch_size=4, embed_dim=16, depth=depth, num_heads=2)
    fields = f"embed_dim=16,depth={depth},num_heads=2"
    return open_encoder(f"random:tiny,{fields}", config=config)


def make_encoder(directory, bands=("red", "green", "blue"), **changes):
    """Saves an encoder with random weights to `directory`."""
    model, rng = MODEL | changes, np.random.default_rng(0)
    encoder = nnx.eval_shape(
        lambda: build_encoder(model, channels=len(bands), rngs=nnx.Rngs(0))
    )
    state = {
        path: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
        for path, leaf in leaves(encoder).items()
    }
    nnx.update(encoder, nnx.State(nnx.traversals.unflatten_mapping(state)))
    mean = tuple(0.1 * (i + 1) for i in range(len(bands)))
    read = Bands(bands, mean, (0.2,) * len(bands))
    described = describe_encoder(model, image_size=16, bands=read, run={})
    Encoder(encoder, described).save(directory)
    return directory
