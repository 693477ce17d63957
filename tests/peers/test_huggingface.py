"""Our MAE is Hugging Face's, on the same random weights; our exports load there.

`make test-peers` runs this: it needs torch and transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import save_file

from tests.support.encoders import make_encoder
from tests.support.peers import BATCH, assert_close, tokens_of
from xsmae.cli.convert import import_checkpoint
from xsmae.methods import METHODS
from xsmae.models.mae import Views
from xsmae.weights.export import export
from xsmae.weights.layouts import leaves, weights_of

SIZES = [
    {
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 3,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "mask_ratio": 0.75,
    },
    {
        "image_size": 48,
        "patch_size": 8,
        "num_channels": 5,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 8,
        "mask_ratio": 0.6,
    },
]
# Theirs to the official names. The order counts.
RENAMED = [
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.layers.", "blocks."),
    ("vit.layernorm", "norm"),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.", ""),
    ("attention.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
]
COMPARED = (
    "blocks.0.attn.qkv.weight",
    "blocks.1.mlp.fc1.bias",
    "cls_token",
    "decoder_blocks.0.norm2.weight",
    "decoder_embed.weight",
    "decoder_pred.bias",
    "mask_token",
    "norm.weight",
    "patch_embed.proj.weight",
)


def official(tensors):
    """Tensors by Hugging Face's names to MAE's, with q, k and v in one."""
    found, thirds = {}, {}
    for name, tensor in tensors.items():
        for theirs, ours in RENAMED:
            if theirs != "decoder." or name.startswith(theirs):
                name = name.replace(theirs, ours)
        stem, projection, end = name.rpartition("_proj.")
        if projection:
            stem, letter = stem.removesuffix(stem[-1]), stem[-1]
            qkv = stem.replace("attention.", "attn.qkv.") + end
            thirds.setdefault(qkv, {})[letter] = tensor
        else:
            found[name] = tensor
    joined = {name: [parts[x] for x in "qkv"] for name, parts in thirds.items()}
    return found | {name: np.concatenate(parts) for name, parts in joined.items()}


def their_mae(sizes, norm_pix_loss):
    """Hugging Face's MAE with random numbers in all that is learned."""
    config = transformers.ViTMAEConfig(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        decoder_intermediate_size=4 * sizes["decoder_hidden_size"],
        layer_norm_eps=1e-6,  # theirs is 1e-12, the official code's 1e-6
        norm_pix_loss=norm_pix_loss,
    )
    model = transformers.ViTMAEForPreTraining(config).eval()
    # A new model has no positions (transformers 5.24): their own code sets them, where
    # nothing is taken to be initialized.
    embeddings = model.vit.embeddings
    for part in (*embeddings.modules(), *model.parameters()):
        part._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def inputs(sizes):
    """Images NCHW, and the noise that decides the mask."""
    rng, side = np.random.default_rng(0), sizes["image_size"]
    images = rng.normal(size=(BATCH, sizes["num_channels"], side, side))
    noise = rng.random((BATCH, (side // sizes["patch_size"]) ** 2))
    return images.astype(np.float32), noise.astype(np.float32)


def views_of(images):
    """Images NCHW as the one view of each sample; its GSD and box have no effect."""
    return Views(
        images=jnp.asarray(np.moveaxis(images, 1, -1)[:, None]),
        gsd=jnp.ones((BATCH, 1, 2)),
        box=jnp.tile(jnp.array([0.0, 0, 1, 1]), (BATCH, 1, 1)),
    )


def ours(imported, images, noise):
    """The output, the loss and its gradients by their official names."""
    method, config = METHODS["mae"], imported.config
    model, loss = config.model.to_dict(), config.loss.to_dict()
    graphdef, params = nnx.split(imported.network)
    views = views_of(images)

    @jax.jit
    def run(params):
        def total(params):
            output = nnx.merge(graphdef, params)(views, jnp.asarray(noise)[:, None])
            terms, _ = method.losses(output, views, model=model, loss=loss)
            return terms["reconstruction"], output

        return jax.value_and_grad(total, has_aux=True)(params)

    (value, output), gradients = run(params)
    gradients = leaves(gradients)
    return (
        output,
        float(value),
        {
            weight.name: weight.theirs(np.asarray(gradients[weight.path]))
            for weight in weights_of(model, method="mae")
        },
    )


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=["small", "larger"])
def test_the_mae(sizes, norm_pix_loss, tmp_path):
    theirs = their_mae(sizes, norm_pix_loss)
    images, noise = inputs(sizes)
    expected = theirs(torch.from_numpy(images), noise=torch.from_numpy(noise))
    expected.loss.backward()
    encoded = theirs.vit(torch.from_numpy(images), noise=torch.from_numpy(noise))
    state = official({k: v.numpy() for k, v in theirs.state_dict().items()})
    save_file(state, tmp_path / "mae.safetensors")
    imported = import_checkpoint(
        tmp_path / "mae.safetensors",
        num_heads=sizes["num_attention_heads"],
        decoder_num_heads=sizes["decoder_num_attention_heads"],
        mask_ratio=sizes["mask_ratio"],
        norm_pix_loss=norm_pix_loss,
    )
    assert imported.config.method == "mae"
    output, loss, gradients = ours(imported, images, noise)
    np.testing.assert_array_equal(output.mask[:, 0], expected.mask.numpy())
    assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
    assert_close(output.pred[:, 0], expected.logits.detach())
    assert_close(output.encoder_tokens[:, 0], encoded.last_hidden_state.detach())
    their_gradients = official(
        {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.requires_grad}
    )
    assert their_gradients.keys() == gradients.keys()
    for name in COMPARED:
        assert_close(gradients[name], their_gradients[name], 1e-3)
        norm = np.linalg.norm(their_gradients[name])
        assert np.linalg.norm(gradients[name]) == pytest.approx(norm, rel=1e-4)


# Our exports.


def loaded(kind, out, **options):
    """Their model, which has found each of its weights in the file, and no more."""
    model, told = kind.from_pretrained(out, output_loading_info=True, **options)
    for name, keys in told.items():
        assert not keys, f"{name}: {keys}"
    assert model.dtype == torch.float32
    return model.eval()


CASES = [
    ({}, {}, {}),
    ({"embed_dim": 32, "num_heads": 4, "depth": 3}, {}, {"image_size": 24}),
    ({"position": "gsd"}, {"gsd": 0.5}, {}),
    ({"position": "gsd"}, {"gsd": 3.0}, {"image_size": 32}),
]


@pytest.mark.parametrize(("changes", "gsd", "size"), CASES)
def test_our_exports(changes, gsd, size, tmp_path):
    source, out = make_encoder(tmp_path / "source", **changes), tmp_path / "out"
    export(source, out, format="huggingface", **gsd, **size)
    images, expected = tokens_of(source, size.get("image_size", 16), **gsd)
    vit = loaded(transformers.ViTModel, out, add_pooling_layer=False)
    with torch.no_grad():
        assert_close(vit(images).last_hidden_state, expected)
    mae = loaded(transformers.ViTMAEModel, out)
    # Every patch, in its order.
    noise = torch.arange(expected.shape[1] - 1.0).expand(BATCH, -1)
    with torch.no_grad():
        assert_close(mae(images, noise=noise).last_hidden_state, expected)


def test_other_bands(tmp_path):
    bands, out = ("red", "nir", "swir1", "swir2"), tmp_path / "out"
    source = make_encoder(tmp_path / "source", bands=bands)
    export(source, out, format="huggingface")
    images, expected = tokens_of(source, 16, bands=4)
    vit = loaded(transformers.ViTModel, out, add_pooling_layer=False)
    with torch.no_grad():
        assert_close(vit(images).last_hidden_state, expected)


def test_the_classifier_starts_from_it(tmp_path):
    source, out = make_encoder(tmp_path / "source"), tmp_path / "out"
    export(source, out, format="huggingface")
    model, told = transformers.ViTForImageClassification.from_pretrained(
        out, num_labels=5, output_loading_info=True
    )
    assert set(told["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not told["unexpected_keys"]
    images, expected = tokens_of(source, 16)
    with torch.no_grad():
        assert_close(model.eval().vit(images).last_hidden_state, expected)
