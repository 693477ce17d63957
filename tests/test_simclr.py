"""SimCLR: what it encodes, its loss, validity, and a run without a decoder."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from xsmae.configs import common

from tests.support.models import MODEL, some_batch, some_views
from tests.support.runs import SMALL_RUN, call, for_method, refused
from xsmae import load_config
from xsmae.config import flatten
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.models.mae import Views
from xsmae.trainer import create_trainer, min_valid

METHOD = METHODS["simclr"]
FIELDS = METHOD.fields("recommended", size="tiny", model=MODEL)
NO_NOISE = jnp.zeros((3, 2, 0))


def built(**changes):
    model = {**MODEL, **FIELDS["model"], **changes}
    return METHOD.build(model, channels=3, view_size=16, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("position", ["fixed", "gsd"])
def test_an_embedding_is_the_mean_patch_of_a_whole_view(position):
    network, views = built(position=position), some_views()
    found = network(views, NO_NOISE).embedding
    assert network.noise_size(16, 16) == 0
    for view in (0, 1):
        corner = views.box[:, view, :2] * 16 * views.gsd[:, 0]  # metres
        tokens = network.encoder(
            views.images[:, view],
            gsd=views.gsd[:, view],
            offset=corner / 4 if position == "gsd" else None,
        )
        expected = tokens[:, 1:].mean(axis=1)
        np.testing.assert_allclose(found[:, view], expected, atol=1e-5)


def test_the_loss_is_nt_xent():
    """optax's has the positive in the denominator, like the paper."""
    network, views = built(projection_dim=8), some_views(4)
    output = network(views, jnp.zeros((4, 2, 0)))
    assert output.embedding.shape == (4, 2, 8)
    loss = {"contrastive": {**FIELDS["loss"]["contrastive"]}}
    loss["contrastive"]["positive_in_denominator"] = True
    terms, extras = METHOD.losses(output, views, model=MODEL, loss=loss)
    assert extras == {}
    z = jnp.concatenate([output.embedding[:, 0], output.embedding[:, 1]])
    labels = jnp.tile(jnp.arange(4), 2)
    expected = optax.losses.ntxent(z, labels, temperature=0.1)
    assert float(terms["contrastive"]) == pytest.approx(float(expected), rel=1e-4)


def test_patches_that_are_not_valid_do_not_count():
    network, views = built(), some_views()
    valid = np.ones(views.images.shape[:-1], bool)
    valid[:, :, :8] = False
    valid[1, 1] = False  # a view without any value
    found = network(
        Views(
            jnp.where(valid[..., None], views.images, 0),
            views.gsd,
            views.box,
            valid=jnp.asarray(valid),
        ),
        NO_NOISE,
    ).embedding
    assert np.isfinite(found).all()
    whole = jnp.where(valid[..., None], views.images, 0)
    tokens = network.encoder(whole[:, 0], gsd=views.gsd[:, 0])[:, 1:]
    expected = tokens[:, 8:].mean(axis=1)  # the lower two rows of four patches
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(found[1, 1], 0)


def small_config(**changes):
    config = common.get_common("recommended", "tiny", "simclr")
    config.batch_size, config.views.size, config.num_steps = 8, 16, 100
    config.optim.warmup_steps, config.optim.learning_rate = 5, 1e-1
    config.model.update(
        patch_size=4, embed_dim=32, depth=2, num_heads=2, dtype="float32"
    )
    config.update_from_flattened_dict(changes)
    return config


def test_training_lowers_the_loss():
    trainer = create_trainer(small_config(), num_images=100)
    assert trainer.predict is None
    state, found = trainer.initial_state(), []
    for _ in range(40):
        state, metrics = trainer.step(state, some_batch(8))
        found.append(float(metrics["loss"]))
    assert found[-1] < found[0] - 1
    assert float(metrics["loss"]) == float(metrics["loss/contrastive"])


def test_parts_of_a_batch_have_their_own_negatives():
    """As groups of the contrastive loss have, so both are the same loss."""
    found = []
    for changes in (
        {"optim.accumulation_steps": 2},
        {"loss.contrastive.groups": 2},
    ):
        trainer = create_trainer(small_config(**changes), num_images=100)
        batch = some_batch(8)
        if "loss.contrastive.groups" in changes:
            # A part has every second sample, a group has neighbours.
            batch = {n: np.concatenate([x[::2], x[1::2]]) for n, x in batch.items()}
        _, metrics = trainer.step(trainer.initial_state(), batch)
        found.append([float(metrics[n]) for n in ("loss", "grad_norm")])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_the_config_has_no_field_without_effect():
    config = load_config("quickstart:simclr")
    fields = flatten(config.to_dict())
    assert not [name for name in fields if "decoder" in name or "mask" in name]
    with pytest.raises(UserError, match=r"mask_ratio.*no such field"):
        load_config("quickstart:simclr", {"model.mask_ratio": 0.5})
    with pytest.raises(UserError, match=r"decoder=small.*simclr has no decoder"):
        load_config("quickstart:simclr,decoder=small")
    added = small_config()
    added.model.decoder_depth = 2
    with pytest.raises(UserError, match=r"does not use model\.decoder_depth"):
        create_trainer(added, num_images=100)


def test_views_need_the_valid_patches_that_they_need_with_masks():
    config = small_config()
    config.dtype = "float32"
    masked = common.get_common("recommended", "tiny", "scale_distill")
    masked.dtype, masked.views.size, masked.model.patch_size = "float32", 16, 4
    assert min_valid(config) == min_valid(masked) == 0.625


def test_a_run_starts_from_the_weights_of_another(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = for_method("simclr", SMALL_RUN)
    steps = ["--config.num_steps=2", "--config.optim.warmup_steps=1"]
    run = ["--config=quickstart:simclr", *flags, *steps, "--config.knn.every=-1"]
    assert call(*run, f"--workdir={first}") == 0
    again = [*run, f"--config.init={first}", "--config.optim.learning_rate=0.0"]
    assert call(*again, f"--workdir={second}") == 0
    one, other = (
        (folder / "encoder/encoder.safetensors").read_bytes()
        for folder in (first, second)
    )
    assert one == other
    info = json.loads((first / "encoder/encoder.json").read_text())
    assert info["run"]["method"] == "simclr"
    assert "# SimCLR encoder" in (first / "encoder/README.md").read_text()
    capsys.readouterr()
    other = for_method("mae", SMALL_RUN)
    line = refused(capsys, "--config=quickstart:mae", *other, f"--config.init={first}")
    assert "has the method simclr" in line
