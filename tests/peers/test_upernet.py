"""Our UperNet head is Hugging Face's, on the same weights. Run `make test-peers`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests.support.peers import BATCH, assert_close
from xsmae.models.upernet import UperNetHead
from xsmae.ops import resize
from xsmae.weights.layouts import leaves

CLASSES, CHANNELS, SIDE = 5, 12, 96
WIDTHS = [8, 12, 16, 20]
# Theirs to ours, as regular expressions. The order counts.
RENAMED = [
    (r"^psp_modules\.(\d)\.1\.", r"pooled.\1."),
    (r"^lateral_convs", "laterals"),
    (r"^fpn_convs", "smoothed"),
    (r"^fpn_bottleneck", "fuse"),
    (r"batch_norm\.weight$", "norm.norm.scale"),
    (r"batch_norm\.bias$", "norm.norm.bias"),
    (r"batch_norm\.running_", "norm.norm."),
    (r"weight$", "kernel"),
]


def ours(tensors):
    """Hugging Face's tensors by our paths, in our layouts."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        for theirs, our in RENAMED:
            name = re.sub(theirs, our, name)
        array = np.asarray(tensor.detach())
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        path = tuple(int(x) if x.isdigit() else x for x in name.split("."))
        # Their last layer is a convolution of side 1, ours is a linear layer.
        found[path] = array[0, 0] if path == ("classifier", "kernel") else array
    return found


@pytest.fixture
def theirs():
    """Hugging Face's UperNet on a small backbone, with random numbers everywhere."""
    backbone = transformers.ConvNextConfig(
        hidden_sizes=WIDTHS,
        depths=[1] * 4,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=CHANNELS,
        num_labels=CLASSES,
        use_auxiliary_head=False,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.decode_head.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif not name.endswith("num_batches_tracked"):
                tensor.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_the_head(training, theirs):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, 3, SIDE, SIDE + 32)).astype(np.float32)
    maps = [x.detach() for x in theirs.backbone(torch.from_numpy(images)).feature_maps]
    head = UperNetHead(WIDTHS, CLASSES, channels=CHANNELS, rngs=nnx.Rngs(0))
    weights = ours(theirs.decode_head.state_dict())
    assert weights.keys() == leaves(nnx.state(head)).keys()
    for path, leaf in leaves(nnx.state(head)).items():
        assert weights[path].shape == leaf.shape, path
    state = {path: jnp.asarray(array) for path, array in weights.items()}
    nnx.update(head, nnx.State(nnx.traversals.unflatten_mapping(state)))
    graphdef, params, statistics = nnx.split(head, nnx.Param, nnx.BatchStat)
    towards = rng.normal(size=(BATCH, CLASSES, SIDE, SIDE + 32)).astype(np.float32)

    theirs.decode_head.train(training)
    expected = theirs(torch.from_numpy(images)).logits
    # The backbone has no dropout, so it gives the same maps again.
    (expected * torch.from_numpy(towards)).sum().backward()
    gradients = {name: p.grad for name, p in theirs.decode_head.named_parameters()}

    @jax.jit
    def run(params):
        def total(params):
            model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, statistics))
            inputs = [jnp.asarray(np.moveaxis(x.numpy(), 1, -1)) for x in maps]
            scores = model(inputs, training=training)
            scores = resize.bilinear(scores, (SIDE, SIDE + 32))
            value = (scores * np.moveaxis(towards, 1, -1)).sum()
            return value, (scores, nnx.state(model, nnx.BatchStat))

        return jax.grad(total, has_aux=True)(params)

    found, (scores, statistics) = run(params)
    assert_close(np.moveaxis(scores, -1, 1), expected.detach())
    found, gradients = leaves(found), ours(gradients)
    assert found.keys() == gradients.keys()
    for path, gradient in gradients.items():
        assert_close(found[path], gradient)
    after = ours(theirs.decode_head.state_dict())
    for path, value in leaves(statistics).items():
        if path[-1] == "mean" or not training:
            assert_close(value, after[path])
        else:  # theirs averages unbiased variances
            drift = np.abs(np.asarray(value) - after[path]).max()
            assert drift <= 0.1 * np.abs(after[path]).max()
