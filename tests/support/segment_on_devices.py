"""Prints JSON about the loss of a head whose batch is divided over all devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.data.mask_classes import IGNORE
from xsmae.evaluation.tasks.segment import cross_entropy
from xsmae.models.upernet import ConvNorm
from xsmae.sharding import by_batch, create_mesh, replicated


def main():
    rng = np.random.default_rng(0)
    # Images differ in level and in how many of their pixels count.
    images = rng.normal(size=(8, 4, 4, 3)) + np.arange(8)[:, None, None, None]
    masks = rng.integers(0, 5, (8, 4, 4)).astype(np.uint8)
    masks[rng.random(masks.shape) < np.linspace(0, 1, 8)[:, None, None]] = IGNORE
    layer = ConvNorm(3, 5, 1, norm="batch", dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)
    mesh = create_mesh(len(images))
    whole, divided = replicated(mesh), by_batch(mesh)

    def run(params, images, masks):
        def loss(params):
            model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, statistics))
            scores = model(images, training=True)
            return cross_entropy(scores, masks), nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    run = jax.jit(run, in_shardings=(whole, divided, divided), out_shardings=whole)
    compiled = run.lower(params, jnp.float32(images), masks).compile()
    (loss, statistics), grads = run(params, jnp.float32(images), masks)
    found = {
        "loss": float(loss),
        "mean": np.asarray(statistics["norm"]["norm"]["mean"][...]).tolist(),
        "gradient": np.asarray(grads["conv"]["kernel"][...]).ravel().tolist(),
        "collectives": "all-reduce" in compiled.as_text(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
