"""The fields of a tiny model, and random input for it and for a step."""

import jax
import jax.numpy as jnp
import numpy as np

from xsmae.models.mae import Views

MODEL = {
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "mlp_ratio": 4.0,
    "mask_ratio": 0.75,
    "norm_style": "pre",
    "norm_epsilon": 1e-6,
    "encoder_norm": True,
    "position": "fixed",
    "reference_gsd": 1.0,
    "predictor_norm": "layer_norm",
    "predictor_hidden_dim": 16,
    "projection_dim": 8,
    "dtype": "float32",
    "attention": "xla",
    "remat": "none",
    "scan": True,
}


def some_views(batch=3, num_views=2, seed=0):
    rng = np.random.default_rng(seed)
    box = np.tile([0.0, 0, 1, 1], (batch, num_views, 1))
    box[:, 1:] = [0.25, 0.125, 0.75, 0.875]
    return Views(
        images=jnp.asarray(rng.normal(size=(batch, num_views, 16, 16, 3)), jnp.float32),
        gsd=jnp.asarray(rng.uniform(0.5, 2, (batch, num_views, 2)), jnp.float32),
        box=jnp.asarray(box, jnp.float32),
    )


def some_noise(batch=3, num_views=2, patches=16, seed=1):
    return jax.random.uniform(jax.random.key(seed), (batch, num_views, patches))


def some_batch(batch=8, num_views=2, seed=0, size=16):
    rng = np.random.default_rng(seed)
    box = np.tile([[0.0, 0, 16, 16], [2, 3, 12, 11]], (batch, 1, 1))[:, :num_views]
    shape = (batch, num_views, size, size, 3)
    return {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "gsd": np.full((batch, num_views, 2), 1.5, np.float32),
        "box": box.astype(np.float32),
        "flip": rng.integers(0, 2, (batch, 2)).astype(bool),
    }
