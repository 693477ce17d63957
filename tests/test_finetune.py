"""Fine-tuning's classifier and the learning rates of its layers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.support.encoders import tiny_encoder
from xsmae.evaluation.fitting import optimizers
from xsmae.evaluation.tasks import finetune as finetuning


def tiny_classifier(feature="mean"):
    network = tiny_encoder().network
    return finetuning.Classifier(
        network, 3, feature=feature, head_std=2e-5, rngs=nnx.Rngs(1)
    )


def test_layer_decay_of_every_slice_of_every_parameter():
    params = nnx.state(tiny_classifier(), nnx.Param)
    ones = jax.tree.map(jnp.ones_like, params)
    scales = optimizers.layer_scales(params, depth=3, decay=0.75)
    found = nnx.to_flat_state(jax.tree.map(jnp.multiply, ones, scales))
    layers = set()
    for path, leaf in found:
        name, leaf = ".".join(map(str, path)), np.asarray(leaf[...])
        if "blocks" in path:
            assert leaf.shape[0] == 3
            expected = [0.75 ** (4 - (i + 1)) for i in range(3)]
            layers.add("blocks")
        elif "patch_embed" in path or "cls_token" in path:
            expected = [0.75**4] * len(leaf)
            layers.add(path[1])
        else:
            assert path[0] in ("fc_norm", "head") or name.startswith("encoder.norm.")
            expected = [1.0] * len(leaf)
            layers.add(path[0])
        for part, value in zip(leaf, expected, strict=True):
            np.testing.assert_allclose(part, value, rtol=1e-6)
    assert layers == {
        "blocks",
        "patch_embed",
        "cls_token",
        "encoder",
        "fc_norm",
        "head",
    }


def test_the_rate_of_a_layer_is_that_of_its_updates():
    """AdamW's first update is rate * (sign of the gradient + decay * weight)."""
    params = nnx.state(tiny_classifier(), nnx.Param)
    optimizer = optimizers.create_adamw(
        0.1, depth=3, layer_decay=0.5, weight_decay=0.2, b1=0.9, b2=0.999
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    params, updates = (dict(nnx.to_flat_state(x)) for x in (params, updates))
    for path, rates in (
        (("encoder", "blocks", "fc1", "kernel"), [0.0125, 0.025, 0.05]),
        (("encoder", "patch_embed", "proj", "kernel"), [0.1 / 16] * 48),
        (("head", "kernel"), [0.1] * 16),
    ):
        for row, rate in enumerate(rates):
            weight = params[path][...][row]
            expected = -rate * (1 + 0.2 * weight)
            np.testing.assert_allclose(updates[path][...][row], expected, rtol=1e-4)
    for path in (("encoder", "cls_token"), ("encoder", "patch_embed", "proj", "bias")):
        np.testing.assert_allclose(updates[path][...], -0.1 / 16, rtol=1e-4)


def test_pooling():
    encoder = tiny_encoder().network
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    gsd = jnp.ones((2, 2))
    tokens = encoder(images, gsd=gsd)
    model = tiny_classifier("cls")
    expected = model.head(model.encoder(images, gsd=gsd)[:, 0])
    np.testing.assert_allclose(model(images, gsd=gsd), expected, rtol=1e-5)
    np.testing.assert_allclose(model.encoder(images, gsd=gsd), tokens, rtol=1e-5)
    model = tiny_classifier("mean")
    pooled = model.encoder(images, gsd=gsd)[:, 1:].mean(1)
    normal = (pooled - pooled.mean(1)[:, None]) / jnp.sqrt(pooled.var(1) + 1e-6)[
        :, None
    ]
    np.testing.assert_allclose(
        model(images, gsd=gsd), normal @ model.head.kernel[...], rtol=1e-3, atol=1e-9
    )
