"""Against what the official implementations compute, in float32.

The cases lie in `../shared/parity` (its README names them); the tests skip where that
folder is absent. MAE and Cross-Scale MAE are read, by a reader of PyTorch files that
knows tensors and nothing else.
"""

import collections
import json
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from xsmae.methods import METHODS
from xsmae.models.mae import Views

CASES = Path(__file__).parent.parent.parent / "shared" / "parity"
pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason=f"no official cases: {CASES} is not there"
)


def read_tensors(path):
    """The state dict of a checkpoint, without PyTorch."""
    with zipfile.ZipFile(path) as archive:

        class Reader(pickle.Unpickler):
            def find_class(self, module, name):
                return {
                    "_rebuild_tensor_v2": tensor,
                    "FloatStorage": np.dtype("<f4"),
                    "LongStorage": np.dtype("<i8"),
                    "OrderedDict": collections.OrderedDict,
                }[name]

            def persistent_load(self, saved):
                _, dtype, key, _, _ = saved
                return np.frombuffer(archive.read(f"{path.stem}/data/{key}"), dtype)

        def tensor(storage, offset, size, stride, *_):
            strides = [step * storage.itemsize for step in stride]
            return np.lib.stride_tricks.as_strided(storage[offset:], size, strides)

        with archive.open(f"{path.stem}/data.pkl") as file:
            return Reader(file).load()["model"]


def linear(name, path):
    yield f"{name}.weight", (*path, "kernel"), lambda x: x.T
    yield f"{name}.bias", (*path, "bias"), lambda x: x


def norm(name, path):
    yield f"{name}.weight", (*path, "scale"), lambda x: x
    yield f"{name}.bias", (*path, "bias"), lambda x: x


def block(theirs, ours, layer, xformers):
    """(official name, our path, our tensor as theirs) of one block."""
    rows = []
    if xformers:
        attention = f"{theirs}.wrap_att.sublayer.layer"
        mlp = f"{theirs}.wrap_ff.sublayer.layer.mlp"
        for part, letter in enumerate("qkv"):
            name = f"{attention}.in_proj_container.{letter}_proj"
            for key, ending in (("kernel", "weight"), ("bias", "bias")):
                rows.append(
                    (
                        f"{name}.{ending}",
                        (*ours, "qkv", key),
                        lambda x, p=part: np.split(x.T, 3)[p],
                    )
                )
        rows += [
            *linear(f"{attention}.proj", (*ours, "proj")),
            *linear(f"{mlp}.0", (*ours, "fc1")),
            *linear(f"{mlp}.3", (*ours, "fc2")),
            *norm(f"{theirs}.wrap_att.norm", (*ours, "norm1")),
            *norm(f"{theirs}.wrap_ff.norm", (*ours, "norm2")),
        ]
    else:
        rows = [
            *linear(f"{theirs}.attn.qkv", (*ours, "qkv")),
            *linear(f"{theirs}.attn.proj", (*ours, "proj")),
            *linear(f"{theirs}.mlp.fc1", (*ours, "fc1")),
            *linear(f"{theirs}.mlp.fc2", (*ours, "fc2")),
            *norm(f"{theirs}.norm1", (*ours, "norm1")),
            *norm(f"{theirs}.norm2", (*ours, "norm2")),
        ]
    return [(n, p, lambda x, f=f: f(x[layer])) for n, p, f in rows]


def table(model, *, cross_scale, xformers):
    """Every official parameter: its name, our path, our tensor as theirs."""
    root = ("mae",) if cross_scale else ()
    encoder, decoder = (*root, "encoder"), (*root, "decoder")
    if cross_scale:
        prefix = "encoders." if xformers else ""
        layers, decoder_layers = f"encoder.{prefix}", f"decoder.{prefix}"
        final = "encoder_norm", "decoder_norm"
    else:
        layers, decoder_layers = "blocks.", "decoder_blocks."
        final = "norm", "decoder_norm"
    p = model["patch_size"]

    def patch(x):
        return rearrange(x, "(p q c) d -> d c p q", p=p, q=p)

    rows = [
        ("cls_token", (*encoder, "cls_token"), lambda x: x),
        ("mask_token", (*decoder, "mask_token"), lambda x: x),
        ("patch_embed.proj.weight", (*encoder, "patch_embed", "kernel"), patch),
        ("patch_embed.proj.bias", (*encoder, "patch_embed", "bias"), lambda x: x),
        *linear("decoder_embed", (*decoder, "embed")),
        *norm(final[0], (*encoder, "norm")),
        *norm(final[1], (*decoder, "norm")),
        *linear("decoder_pred", (*decoder, "pred")),
    ]
    for i in range(model["depth"]):
        rows += block(f"{layers}{i}", (*encoder, "blocks"), i, xformers)
    for i in range(model["decoder_depth"]):
        rows += block(f"{decoder_layers}{i}", (*decoder, "blocks"), i, xformers)
    if cross_scale:
        rows += [
            *linear("predictor.0", ("predictor", "fc1")),
            *norm("predictor.1", ("predictor", "norm")),
            *linear("predictor.3", ("predictor", "fc2")),
        ]
    return rows


def flat(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {tuple(k.key for k in path if hasattr(k, "key")): x for path, x in leaves}


def load(model, tensors, rows):
    """Put the official tensors into our parameters; every tensor must find a place."""
    params = {
        path: np.array(x) for path, x in flat(nnx.state(model, nnx.Param)).items()
    }
    placed = set()
    for name, path, theirs in rows:
        if name not in tensors and name.startswith("predictor.1"):
            continue
        # Written through a view: `theirs` only transposes and slices.
        view = theirs(params[path])
        assert view.shape == tensors[name].shape, name
        if np.shares_memory(view, params[path]):
            view[...] = tensors[name]
        else:  # the patch embedding's transposition is a copy
            p = int(view.shape[-1])
            params[path][...] = rearrange(
                tensors[name], "d c p q -> (p q c) d", p=p, q=p
            )
        placed.add(name)
    computed = {n for n in tensors if "pos_embed" in n or "running" in n}
    computed |= {n for n in tensors if n.endswith("num_batches_tracked")}
    assert set(tensors) - placed - computed == set()
    state = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    new = [
        jnp.asarray(params[tuple(k.key for k in path if hasattr(k, "key"))])
        for path, _ in leaves
    ]
    nnx.update(model, jax.tree_util.tree_unflatten(tree, new))


def sizes(case):
    """A case's sizes as `config.model` has them, and `config.loss`, as published."""
    cross_scale = "dim_model" in case
    xformers = case.get("use_xformers", False)
    names = (
        ("dim_model", "encoder_num_layers", "encoder_num_heads", "decoder_num_layers")
        if cross_scale
        else ("embed_dim", "depth", "num_heads", "decoder_depth")
    )
    embed_dim, depth, num_heads, decoder_depth = (case[name] for name in names)
    model = {
        "patch_size": case["patch_size"],
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "decoder_embed_dim": case["decoder_embed_dim"],
        "decoder_depth": decoder_depth,
        "decoder_num_heads": case["decoder_num_heads"],
        "mlp_ratio": 4.0,
        "mask_ratio": case["mask_ratio"],
        "norm_style": "post" if xformers else "pre",
        "norm_epsilon": 1e-5 if xformers else 1e-6,
        "encoder_norm": not cross_scale,
        "position": "fixed",
        "reference_gsd": 1.0,
        "predictor_norm": "batch_norm",
        "predictor_hidden_dim": case.get("predictor_hidden_size"),
        "projection_dim": 0,
        "dtype": "float32",
        "attention": "xla",
        "remat": "none",
        "scan": True,
    }
    loss = {
        "reconstruction": {"norm_pix_loss": case["norm_pix_loss"], "views": "sum"},
        "contrastive": {
            "temperature": case.get("temperature"),
            "positive_in_denominator": False,
            "groups": 1,
        },
        "cross_prediction": {"stop_gradient": False, "aligned": False},
    }
    return model, loss


def close(found, expected, tolerance, what):
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(found) - expected).max() / max(scale, 1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize(
    "name",
    [
        "cross_scale_mae_norm_pix",
        "cross_scale_mae_raw_pix",
        "cross_scale_mae_xformers",
        "mae",
    ],
)
def test_parity(name):
    case = json.loads((CASES / f"{name}.json").read_text())
    arrays = np.load(CASES / f"{name}.npz")
    cross_scale = "dim_model" in case
    method = METHODS["cross_scale_mae" if cross_scale else "mae"]
    model_sizes, loss = sizes(case)
    size = arrays["images"].shape[1]
    model = method.build(model_sizes, view_size=size, rngs=nnx.Rngs(0))
    rows = table(
        model_sizes, cross_scale=cross_scale, xformers=case.get("use_xformers", False)
    )
    load(model, read_tensors(CASES / f"{name}.pth"), rows)

    endings = ["", "_crop"][: method.num_views]
    images = np.stack([arrays[f"images{e}"] for e in endings], axis=1)
    noise = np.stack([arrays[f"noise{e}"] for e in endings], axis=1)
    batch = len(images)
    views = Views(
        jnp.asarray(images),
        jnp.ones((batch, len(endings), 2)),
        jnp.tile(jnp.array([0.0, 0, 1, 1]), (batch, len(endings), 1)),
    )
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, stats):
        def total(params):
            model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, stats))
            output = model(views, noise)
            terms, extras = method.losses(
                output, views, patch_size=case["patch_size"], loss=loss
            )
            after = nnx.state(model, nnx.BatchStat)
            return sum(terms.values()), (output, terms | extras, after)

        return jax.value_and_grad(total, has_aux=True)(params)

    (total, (output, terms, after)), grads = run(params, stats)

    for view, ending in enumerate(endings):
        for array in ("pred", "mask", "encoder_tokens", "decoder_tokens"):
            if array + ending in arrays:
                found = getattr(output, array)[:, view]
                close(found, arrays[array + ending], 1e-4, array + ending)
    expected = {"loss_total": total}
    if cross_scale:
        expected |= {
            "loss_reconstruction": terms["reconstruction_view1"],
            "loss_reconstruction_crop": terms["reconstruction_view2"],
            "loss_contrastive": terms["contrastive"],
            "loss_cross_prediction": terms["cross_prediction"],
        }
        stats = flat(after)
        for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
            found = stats["predictor", "norm", ours]
            close(found, arrays[f"after/predictor.1.{theirs}"], 1e-4, theirs)
    for array, found in expected.items():
        close(found, arrays[array], 1e-5, array)

    gradients = flat(grads)
    compared = 0
    for official, path, theirs in rows:
        gradient = theirs(np.asarray(gradients[path]))
        key = f"grad_norm/{official}"
        if key in arrays:
            found, norm_of = np.linalg.norm(gradient), float(arrays[key])
            # A bias before a softmax or a norm has no gradient but rounding.
            assert abs(found - norm_of) <= 1e-3 * norm_of + 1e-6, official
            compared += 1
        if f"grad/{official}" in arrays:
            close(gradient, arrays[f"grad/{official}"], 1e-3, official)
    norms = {k for k in arrays.files if k.startswith("grad_norm/")}
    assert compared == len(norms)
