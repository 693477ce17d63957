"""Prints JSON about three steps of every method on all devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from xsmae.configs import common

from tests.support.models import some_batch
from xsmae import sharding
from xsmae.losses import contrastive
from xsmae.methods import METHODS
from xsmae.planning.collectives import read_collectives
from xsmae.sharding import by_batch, create_mesh, put_batch, replicated
from xsmae.trainer import batch_shapes, create_trainer, crop_size

# Method, preset, changes of the model, and the number of devices that share the state.
RUNS = [
    ("cross_scale_mae", "published", {}, 1),
    ("cross_scale_mae", "corrected", {}, 1),
    ("cross_scale_mae", "corrected", {}, 4),
    ("mae", "published", {}, 1),
    (
        "scale_distill",
        "recommended",
        {"coarse_scales": (0.5, 0.25), "coarse_area": (0.3, 1.0), "teacher": "ema"},
        4,
    ),
    ("scale_mae", "published", {"head_dim": 8, "target_scale": 2}, 1),
    ("sigreg", "recommended", {"local_crops": 2, "projection_hidden_dim": 16}, 1),
    ("simclr", "recommended", {"projection_dim": 8}, 4),
    (
        "sat_mae",
        "published",
        {"channel_groups": ((0, 2), (1,)), "group_dim": 4, "decoder_group_dim": 4},
        1,
    ),
]


BATCH = 512


def contrastive_memory(positive_in_denominator):
    """Temporary bytes per device of the contrastive loss and its gradient."""
    mesh = create_mesh(BATCH)

    def loss(embedding):
        return contrastive(
            embedding,
            temperature=0.5,
            positive_in_denominator=positive_in_denominator,
        )

    compiled = (
        jax.jit(
            jax.value_and_grad(loss),
            in_shardings=by_batch(mesh),
            out_shardings=(replicated(mesh), by_batch(mesh)),
        )
        .lower(jax.ShapeDtypeStruct((BATCH, 2, 32), jnp.float32))
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def exchanged(trainer, config):
    """Bytes of the step's collectives by kind and devices, and of the parameters."""
    shapes = trainer.state_shapes()
    text = trainer.step.lower(shapes, batch_shapes(config)).compile().as_text()
    devices = jax.device_count()
    found = {"parameters": 4 * sum(x.size for x in jax.tree.leaves(shapes.params))}
    for one in read_collectives(text, devices, devices):
        found[f"{one.kind} {one.group}"] = one.size
    return found


def main():
    sharding.MIN_DIVIDED = 1024  # this network's kernels are that small
    found = {
        "devices": jax.device_count(),
        "batch": BATCH,
        "contrastive": [contrastive_memory(p) for p in (True, False)],
    }
    for method, preset, changes, fsdp in RUNS:
        config = common.get_common(preset, "tiny", method)
        config.batch_size = 16
        config.mesh = f"data:-1,fsdp:{min(fsdp, jax.device_count())}"
        config.num_steps = 10
        config.optim.warmup_steps = 1
        config.optim.learning_rate = 1e-2
        config.views.size = 16
        config.model.update(
            patch_size=4, embed_dim=16, depth=2, num_heads=2, dtype="float32", **changes
        )
        if "decoder_depth" in config.model:
            config.model.update(
                decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2
            )
        trainer = create_trainer(config, num_images=100)
        state, losses = trainer.initial_state(), []
        initial = (trainer.initial_params(), state.params)
        for one, other in zip(*map(jax.tree.leaves, initial), strict=True):
            assert one.sharding == other.sharding
            np.testing.assert_array_equal(one, other)
        num_views = METHODS[method].num_views
        for seed in range(3):
            batch = some_batch(16, num_views, seed, size=crop_size(config))
            arrays = put_batch(batch, by_batch(trainer.mesh))
            assert len(arrays["image"].sharding.device_set) == jax.device_count()
            state, metrics = trainer.step(state, arrays)
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        norms = [float(np.linalg.norm(x)) for x in jax.tree.leaves(state.params)]
        images = batch["image"][:, 0, :16, :16]
        encoded = trainer.encode(state.params, images, batch["gsd"][:, 0])
        kernel = next(
            x for x in jax.tree.leaves(state.params) if x.shape == (2, 16, 64)
        )
        found[f"{method} {preset} fsdp {fsdp}"] = {
            "kernel": kernel.addressable_shards[0].data.shape,
            "losses": losses,
            "norms": norms,
            # Only a divided state is looked at: this traces the step again.
            "exchanged": exchanged(trainer, config) if fsdp > 1 else None,
            "features": np.asarray(encoded["mean"])[:, :4].tolist(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
