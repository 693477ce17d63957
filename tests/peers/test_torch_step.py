"""The PyTorch step of the benchmark computes the same losses as ours."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange

from benchmarks import torch_step, train_step
from xsmae import losses

SIZES = dict(
    patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0, mask_ratio=0.75,
    decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, norm_epsilon=1e-6,
)  # fmt: skip
BATCH, SIZE = 3, 16


def images():
    rng = np.random.default_rng(0)
    return torch.from_numpy(
        rng.normal(size=(2 * BATCH, 3, SIZE, SIZE)).astype(np.float32)
    )


def by_view(tensor):
    """Converts view 1 of all samples, then view 2, to our layout."""
    return jnp.asarray(rearrange(tensor.detach().numpy(), "(v b) ... -> b v ...", v=2))


def test_the_losses_of_the_peer():
    """test_huggingface.py compares the reconstruction with ours."""
    torch.manual_seed(0)
    mae = torch_step.create_mae(SIZES, size=SIZE, channels=3)
    peer = torch_step.CrossScale(mae, temperature=0.3).train()
    reconstruction, encoded, decoded = peer.outputs(images())
    found = peer.losses(reconstruction, encoded, decoded)
    tokens = by_view(decoded)[:, :, 1:]
    with torch.no_grad():
        predicted = peer.predictor(decoded[BATCH:, 1:]).numpy()
    expected = {
        "contrastive": losses.contrastive(
            by_view(encoded)[:, :, 1:].mean(2),
            temperature=0.3,
            positive_in_denominator=True,
        ),
        "cross_prediction": losses.cross_prediction(
            jnp.asarray(predicted), tokens[:, 0], stop_gradient=True
        ),
    }
    assert found.keys() == {"reconstruction", *expected}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("dtype", train_step.DTYPES)
def test_a_step_of_the_peer_learns(dtype):
    step = torch_step.create_step(
        SIZES,
        size=SIZE,
        channels=3,
        temperature=0.5,
        learning_rate=1e-2,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        dtype=dtype,
        compiled=False,
    )
    found = [step(images()).item() for _ in range(8)]
    assert found[-1] < found[0]
