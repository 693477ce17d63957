"""Importing official checkpoints: every system, every error, runs that start there.

The files come from our own networks with random weights, and from the official cases in
`../shared/parity` if that folder exists.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from xsmae.configs import common

import xsmae
from xsmae.cli import convert
from xsmae.cli import pretrain as main
from xsmae.cli.arguments import given_fields, parse
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.models.mae import Views
from xsmae.process.files import read_jsonl
from xsmae.trainer import create_trainer
from xsmae.weights import official, official_bands
from xsmae.weights.layouts import collect, encoder_weights, leaves, weights_of
from xsmae.weights.official import import_checkpoint
from xsmae.weights.torch_pickle import Namespace
from xsmae.weights.warm_start import adopt, load_weights

CASES = Path(__file__).parent.parent.parent / "shared" / "parity"
SIZE = 16
SMALL = {
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "dtype": "float32",
}
HEADS = {"num_heads": 3, "decoder_num_heads": 2}
GROUPS = ((0, 2), (1, 3, 4))
GROUPED = {"channel_groups": GROUPS, "group_dim": 8, "decoder_group_dim": 4}
SCALE = {"head_dim": 8, "reference_gsd": 2.5}
# The official code with timm's blocks.
PRE_NORM = {"norm_style": "pre", "norm_epsilon": 1e-6, "predictor_hidden_dim": 20}
# System -> method, naming, and its differences from the published config.
SYSTEMS = {
    "mae": ("mae", "timm", {}),
    "mae_of_cross_scale": ("mae", "cross_scale_timm", {"encoder_norm": False}),
    "sat_mae": ("sat_mae", "timm", {}),
    "sat_mae_groups": ("sat_mae", "timm", GROUPED),
    "scale_mae": ("scale_mae", "timm", SCALE),
    "scale_mae_progressive": ("scale_mae", "timm", SCALE | {"progressive": True}),
    "scale_mae_one_head": (
        "scale_mae",
        "timm",
        SCALE | {"independent_heads": False, "head_depth": 1, "target_scale": 4},
    ),
    "cross_scale_mae": ("cross_scale_mae", "cross_scale_timm", PRE_NORM),
    "cross_scale_mae_xformers": (
        "cross_scale_mae",
        "cross_scale_xformers",
        {"predictor_hidden_dim": 20},
    ),
}
# Options that the keys of these files do not show.
TOLD = {
    "sat_mae": {"method": "sat_mae"},
    "sat_mae_groups": {"channel_groups": GROUPS},
}


def options_of(system):
    return HEADS | TOLD.get(system, {})


def model_of(method, **changes):
    return common.get_common("published", "base", method).model.to_dict() | changes


def num_bands(model):
    return sum(map(len, model.get("channel_groups", ()))) or 3


def abstract(model, method):
    """The network with shapes only."""
    sizes = {"channels": num_bands(model), "view_size": SIZE}
    build = METHODS[method].build
    return nnx.eval_shape(lambda: build(model, **sizes, rngs=nnx.Rngs(0)))


def randomized(network, seed=0):
    """Random numbers in every array: after training, none has its initial values."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        numbers = rng.normal(0, 0.2, leaf.shape)
        if "'var'" in jax.tree_util.keystr(path):
            numbers = np.abs(numbers) + 0.5
        return jnp.asarray(numbers, jnp.float32)

    state = jax.tree_util.tree_map_with_path(fill, nnx.state(network))
    nnx.update(network, state)
    return network


def sincos(width, positions):
    """MAE's get_1d_sincos_pos_embed_from_grid."""
    omega = 1 / 10000 ** (np.arange(width // 2) / (width / 2))
    angle = np.outer(positions, omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def pos_embed(width, side):
    """MAE's get_2d_sincos_pos_embed, with the class token."""
    rows, columns = np.divmod(np.arange(side**2), side)
    grid = np.concatenate([sincos(width // 2, columns), sincos(width // 2, rows)], 1)
    return np.concatenate([np.zeros((1, width)), grid])[None].astype(np.float32)


def encodings(model, naming, parts=("", "decoder_")):
    """The encodings that official files store with the weights."""
    groups, found = len(model.get("channel_groups", ())), {}
    for part in parts:
        width = model[f"{part}embed_dim"]
        if groups:
            of_groups = sincos(
                model[f"{part}group_dim"], np.arange(groups + bool(part))
            )
            found[f"{part}channel_embed"] = of_groups[None].astype(np.float32)
            width -= model[f"{part}group_dim"]
        first = "encoder_pos_embed" if naming.startswith("cross") else "pos_embed"
        found["decoder_pos_embed" if part else first] = pos_embed(
            width, SIZE // model["patch_size"]
        )
    return found


@functools.cache
def original(system):
    """A network of ours, and the same network in an official file's layout."""
    method, naming, changes = SYSTEMS[system]
    model = model_of(method, **{**SMALL, **changes})
    network = randomized(abstract(model, method))
    tensors = collect(network, weights_of(model, method=method, naming=naming))
    tensors |= encodings(model, naming)
    if method == "cross_scale_mae":
        tensors["predictor.1.num_batches_tracked"] = np.array(7)
    if method == "scale_mae":
        tensors["mask_token_decoder"] = np.zeros((1, 1, 16), np.float32)
    return network, model, tensors


def tensors_of(system):
    return dict(original(system)[2])


def written(tensors, tmp_path, name="x.safetensors"):
    save_file({k: np.array(v, order="C") for k, v in tensors.items()}, tmp_path / name)
    return tmp_path / name


@pytest.fixture
def saved_as(monkeypatch):
    """`saved_as(content)`: makes every checkpoint file appear to have this content."""
    return lambda content: monkeypatch.setattr(
        official, "read_pytorch", lambda path: content
    )


def inputs(model, views=1):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(3, views, SIZE, SIZE, num_bands(model)))
    gsd = np.tile(rng.uniform(0.5, 8, (3, 1, 1)), (1, views, 2))
    box = np.tile([0.0, 0.0, 1.0, 1.0], (3, views, 1))
    read = Views(*(jnp.asarray(x, jnp.float32) for x in (images, gsd, box)))
    numbers = 16 * max(1, len(model.get("channel_groups", ())))
    return read, jnp.asarray(rng.random((3, views, numbers)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, rest, views, noise):
    rest = jax.tree.map(lambda x: x, rest)  # a copy that this trace may write to
    return nnx.merge(graphdef, params, rest)(views, noise)


def outputs(network, views, noise):
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    return jax.tree.leaves(forward(graphdef, params, rest, views, noise))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_import_computes_what_the_original_does(system, tmp_path):
    network, model, tensors = original(system)
    imported = import_checkpoint(written(tensors, tmp_path), **options_of(system))
    method = SYSTEMS[system][0]
    assert imported.config.method == method
    assert not imported.encoder_only
    found = imported.config.model.to_dict()
    # A field without effect keeps its default.
    assert {k: v for k, v in found.items() if v != model[k]} == {}
    views, noise = inputs(model, METHODS[method].num_views)
    expected = outputs(network, views, noise)
    assert_same(outputs(imported.network, views, noise), expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_encoder_alone(system, tmp_path):
    network, model, tensors = original(system)
    method, naming, _ = SYSTEMS[system]
    encoder = getattr(network, "mae", network).encoder
    names = [w.name for w in encoder_weights(model, naming=naming)]
    names += [*encodings(model, naming, parts=("",))]
    alone = {name: tensors[name] for name in names}
    options = {k: v for k, v in options_of(system).items() if "decoder" not in k}
    if method == "scale_mae":
        options["method"] = method  # its encoder has the same names as MAE's
    imported = import_checkpoint(written(alone, tmp_path), **options)
    assert imported.encoder_only
    assert imported.encoder is imported.network
    # The encoder of Cross-Scale MAE's baseline looks the same.
    expected = "cross_scale_mae" if naming.startswith("cross") else method
    assert imported.config.method == expected
    assert imported.config.views.size == SIZE
    assert_same(leaves(imported.encoder).values(), leaves(encoder).values())
    images, gsd = (x[:, 0] for x in (inputs(model)[0].images, inputs(model)[0].gsd))
    if imported.encoder.positions.position == "fixed":
        gsd = None
    np.testing.assert_array_equal(
        imported.encoder(images, gsd=gsd), encoder(images, gsd=gsd)
    )


def test_an_encoder_alone_without_positions(tmp_path):
    names = [w.name for w in encoder_weights(original("mae")[1])]
    alone = {name: tensors_of("mae")[name] for name in names}
    path = written(alone, tmp_path)
    with pytest.raises(UserError, match=r"lacks pos_embed.*--image_size=PIXELS"):
        import_checkpoint(path, num_heads=3)
    imported = import_checkpoint(path, num_heads=3, image_size=32)
    assert imported.config.views.size == 32


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mae", "mae"),
        ("satmae_group_channels", "sat_mae"),
        ("scale_mae", "scale_mae"),
        ("cross_scale_mae_raw_pix", "cross_scale_mae"),
        ("cross_scale_mae_xformers", "cross_scale_mae"),
    ],
)
def test_official_files(name, method):
    sizes = json.loads((CASES / f"{name}.json").read_text())
    heads = sizes.get("encoder_num_heads", sizes.get("num_heads"))
    imported = import_checkpoint(
        CASES / f"{name}.pth", num_heads=heads, decoder_num_heads=4
    )
    model = imported.config.model
    assert imported.config.method == method
    assert "not weights: epoch" in imported.notes
    assert model.embed_dim == sizes.get("embed_dim", sizes.get("dim_model"))
    assert model.depth == sizes.get("depth", sizes.get("encoder_num_layers"))
    side = sizes.get("img_size", sizes.get("input_size"))
    assert imported.config.views.size == side


# Arguments and options besides tensors.


def with_arguments(tensors, **arguments):
    saved = Namespace()
    vars(saved).update(arguments)
    return {"model": tensors, "args": saved, "epoch": 3, "optimizer": {}}


def test_saved_arguments(saved_as):
    content = with_arguments(
        tensors_of("mae"), **HEADS, norm_pix_loss=True, mask_ratio=0.5, lr=1.0
    )
    saved_as(content)
    imported = import_checkpoint("x.pth")
    assert imported.config.model.num_heads == 3
    assert imported.config.model.decoder_num_heads == 2
    assert imported.config.model.mask_ratio == 0.5
    assert imported.config.loss.reconstruction.norm_pix_loss is True
    assert imported.notes == (
        "not weights: epoch, optimizer",
        "computed, not learned: pos_embed, decoder_pos_embed (checked)",
    )
    given = import_checkpoint("x.pth", num_heads=4, norm_pix_loss=False)
    assert given.config.model.num_heads == 4
    assert given.config.model.mask_ratio == 0.5
    assert given.config.loss.reconstruction.norm_pix_loss is False


def test_the_groups_of_satmae_s_arguments(saved_as):
    groups = [list(group) for group in GROUPS]
    saved_as(with_arguments(tensors_of("sat_mae_groups"), grouped_bands=groups))
    model = import_checkpoint("x.pth", **HEADS).config.model
    assert model.channel_groups == GROUPS
    assert model.spatial_mask is False
    # The default means no groups.
    saved_as(with_arguments(tensors_of("sat_mae"), grouped_bands=[]))
    imported = import_checkpoint("x.pth", **HEADS, method="sat_mae")
    assert imported.config.model.channel_groups == ()


def test_what_nobody_tells_is_said(tmp_path):
    path = written(tensors_of("mae"), tmp_path)
    notes = import_checkpoint(path, **HEADS, mask_ratio=0.75).notes
    assert notes[0].endswith("published: norm_pix_loss")


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_where_the_weights_lie(key, saved_as):
    tensors = {f"module.{k}": v for k, v in tensors_of("mae").items()}
    saved_as(tensors if key is None else {key: tensors})
    imported = import_checkpoint("x.pth", **HEADS)
    assert_same(leaves(imported.network).values(), leaves(original("mae")[0]).values())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], r"x\.pth has a list"),
        ({"model": {}}, "no weights under 'model'"),
        ({"model": {"cls_token": 3}}, "not tensors, cls_token"),
        ({"epoch": 3}, "not tensors, epoch"),
        ({"conv1.weight": np.ones(3)}, r"conv1\.weight.*Cross-Scale MAE"),
    ],
)
def test_no_checkpoint(content, expected, saved_as):
    saved_as(content)
    with pytest.raises(UserError, match=expected):
        import_checkpoint("x.pth")


@pytest.mark.parametrize(
    ("width", "heads", "decoder_width", "decoder_heads"),
    [(192, 3, 128, 4), (384, 6, 512, 16)],
)
def test_standard_widths(width, heads, decoder_width, decoder_heads, saved_as):
    model = model_of(
        "mae", **SMALL | {"embed_dim": width, "decoder_embed_dim": decoder_width}
    )
    model["depth"] = 1
    network = abstract(model, "mae")
    shapes = {path: np.zeros(leaf.shape) for path, leaf in leaves(network).items()}
    weights = weights_of(model, method="mae")
    tensors = {w.name: w.theirs(shapes[w.path]) for w in weights}
    saved_as(tensors | encodings(model, "timm"))
    found = import_checkpoint("x.pth").config.model
    assert (found.num_heads, found.decoder_num_heads) == (heads, decoder_heads)


@pytest.mark.parametrize("missing", HEADS)
def test_other_widths_are_asked_for(missing, tmp_path):
    options = {k: v for k, v in HEADS.items() if k != missing}
    with pytest.raises(UserError, match=f"give --{missing}=N"):
        import_checkpoint(written(tensors_of("mae"), tmp_path), **options)


@pytest.mark.parametrize("hidden", [41, 64, 120])
def test_any_width_of_the_mlp(hidden, tmp_path):
    """44 * (120 / 44) is below 120 in floating point."""
    model = model_of("mae", **SMALL | {"embed_dim": 44, "num_heads": 4})
    alone = {
        "cls_token": np.zeros((1, 1, 44)),
        "pos_embed": pos_embed(44, 4),
        "patch_embed.proj.weight": np.zeros((44, 3, 4, 4)),
    }
    for name in encoder_weights(model):
        shape = {"qkv": (132, 44), "proj": (44, 44), "fc1": (hidden, 44)}
        shape["fc2"] = (44, hidden)
        part = name.name.split(".")[-2] if "." in name.name else ""
        full = shape.get(part, (44,))
        if name.name not in alone:
            alone[name.name] = np.zeros(full[:1] if "bias" in name.name else full)
    imported = import_checkpoint(written(alone, tmp_path), num_heads=4)
    assert imported.encoder.blocks.fc1.kernel.shape == (2, 44, hidden)


# Wrong keys.


def told(tensors, tmp_path, system="mae", **options):
    """The message of the refusal."""
    with pytest.raises(UserError) as error:
        import_checkpoint(written(tensors, tmp_path), **options_of(system) | options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_key_renamed(tmp_path):
    for key in tensors_of("mae"):
        tensors = tensors_of("mae")
        tensors[f"{key}_2"] = tensors.pop(key)
        line = told(tensors, tmp_path)
        assert key in line.replace(f"{key}_2", ""), (key, line)


# For each system, some keys that decide sizes and some that do not.
KEYS = [
    ("mae", "cls_token"),
    ("mae", "mask_token"),
    ("mae", "patch_embed.proj.weight"),
    ("mae", "blocks.0.mlp.fc1.weight"),
    ("mae", "blocks.1.attn.qkv.weight"),
    ("mae", "decoder_blocks.0.attn.proj.weight"),
    ("mae", "decoder_embed.weight"),
    ("mae", "decoder_pred.weight"),
    ("mae", "pos_embed"),
    ("mae", "decoder_pos_embed"),
    ("cross_scale_mae", "encoder_pos_embed"),
    ("cross_scale_mae", "predictor.0.weight"),
    ("cross_scale_mae", "decoder.0.mlp.fc1.weight"),
    (
        "cross_scale_mae_xformers",
        "encoder.encoders.1.wrap_att.sublayer.layer.in_proj_container.k_proj.weight",
    ),
    (
        "cross_scale_mae_xformers",
        "encoder.encoders.0.wrap_ff.sublayer.layer.mlp.0.weight",
    ),
    ("sat_mae_groups", "patch_embed.1.proj.weight"),
    ("sat_mae_groups", "channel_embed"),
    ("sat_mae_groups", "decoder_channel_embed"),
    ("sat_mae_groups", "decoder_pred.0.weight"),
    ("scale_mae", "fpn.fpn1.0.weight"),
    ("scale_mae", "fpn.fpn1.3.bias"),
    ("scale_mae_one_head", "fcn.proj.bias"),
    ("scale_mae", "fcn_low.pred.1.weight"),
    ("scale_mae", "fcn_high.conv_blocks.1.convs.3.weight"),
    ("scale_mae", "decoder_pos_embed"),
]


def transposed(tensor):
    """The transposed tensor; a square one is made longer instead."""
    if tensor.shape == tensor.T.shape:
        return np.concatenate([tensor, tensor])
    return tensor.T


@pytest.mark.parametrize(("system", "key"), KEYS)
def test_a_key_transposed_or_dropped(system, key, tmp_path):
    tensors = tensors_of(system)
    tensors[key] = transposed(tensors[key])
    assert key in told(tensors, tmp_path, system)
    del tensors[key]
    assert key in told(tensors, tmp_path, system)


@pytest.mark.parametrize(
    "key",
    ["predictor.0.bias", "norm.bias", "blocks.0.norm1.weight", "decoder_norm.weight"],
)
def test_a_vector_that_is_too_long(key, tmp_path):
    system = "cross_scale_mae" if key.startswith("predictor") else "mae"
    tensors = tensors_of(system)
    tensors[key] = np.concatenate([tensors[key]] * 2)
    assert key in told(tensors, tmp_path, system)


def test_all_of_several_are_named(tmp_path):
    tensors = tensors_of("cross_scale_mae")
    dropped = ("cls_token", "encoder.1.norm1.bias", "decoder_pos_embed")
    for key in dropped:
        del tensors[key]
    tensors["head.weight"] = np.ones((4, 3), np.float32)
    turned = ("encoder.0.mlp.fc2.weight", "decoder_embed.weight")
    for key in turned:
        tensors[key] = tensors[key].T
    line = told(tensors, tmp_path, "cross_scale_mae")
    for key in dropped:
        assert f"{key}: expected (" in line
        assert f"{tensors_of('cross_scale_mae')[key].shape}, found nothing" in line
    assert "head.weight: expected nothing, found (4, 3)" in line
    assert "decoder_embed.weight: expected (16, 24), found (24, 16)" in line
    assert line.count("found") == 6


def test_a_decoder_in_part(tmp_path):
    """Missing keys of a decoder are named even if only some are missing."""
    tensors = tensors_of("mae")
    for key in [k for k in tensors if k.startswith("decoder") or k == "mask_token"]:
        if key != "decoder_pred.bias":
            del tensors[key]
    line = told(tensors, tmp_path)
    assert "mask_token" in line
    tensors["mask_token"] = tensors_of("mae")["mask_token"]
    line = told(tensors, tmp_path)
    assert "decoder_embed.weight" in line
    assert "decoder_norm.bias" in line


def test_the_first_block_has_the_encoder_s_width(tmp_path):
    """Safetensors sorts keys: `decoder.0` comes before `encoder.0`."""
    path = written(tensors_of("cross_scale_mae"), tmp_path)
    names = list(load_file(path))
    first, second = (f"{part}.0.mlp.fc1.bias" for part in ("decoder", "encoder"))
    assert names.index(first) < names.index(second)
    assert import_checkpoint(path, **HEADS).config.model.mlp_ratio == 4.0


@pytest.mark.parametrize("key", ["pos_embed", "decoder_pos_embed"])
@pytest.mark.parametrize("change", [lambda x: x + 0.01, lambda x: x * np.nan])
def test_learned_positions(key, change, tmp_path):
    tensors = tensors_of("mae")
    tensors[key] = change(tensors[key])
    assert f"{key} (1, 17, " in told(tensors, tmp_path)
    assert "learned or resized" in told(tensors, tmp_path)


def test_half_precision(tmp_path):
    halves = {k: v.astype(np.float16) for k, v in tensors_of("mae").items()}
    imported = import_checkpoint(written(halves, tmp_path), **HEADS)
    for path, leaf in leaves(imported.network).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, leaves(original("mae")[0])[path], atol=1e-3)


def test_positions_of_no_square(tmp_path):
    tensors = tensors_of("mae")
    tensors["pos_embed"] = tensors["pos_embed"][:, :16]
    assert "pos_embed has 15 patches" in told(tensors, tmp_path)


def test_an_index_without_end(tmp_path):
    tensors = tensors_of("mae")
    tensors["blocks.999999999.norm1.bias"] = tensors["blocks.1.norm1.bias"]
    assert "blocks.2.norm1.bias" in told(tensors, tmp_path)


@pytest.mark.parametrize("method", ["scale_distill", "simclr"])
def test_a_method_without_official_files(method, tmp_path):
    parts = ("decoder", "mask_token")
    tensors = {k: v for k, v in tensors_of("mae").items() if not k.startswith(parts)}
    line = told(tensors, tmp_path, method=method)
    assert f"--method={method}, expected one of cross_scale_mae, mae, sat_mae" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "scale_mae"}, "give --method=cross_scale_mae"),
        ({"method": "simmim"}, "give --method=cross_scale_mae"),
        ({"num_heads": 5}, "24 is not a multiple of 5"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": (3, 3)}, "num_heads="),
        ({"num_heads": True}, "num_heads=True"),
        ({"image_size": 32}, "image_size=32, but encoder_pos_embed in"),
        ({"image_size": -1}, "image_size=-1"),
        ({"mask_ratio": 1.5}, "mask_ratio=1.5"),
        ({"temperature": 0}, "temperature=0"),
        ({"norm_pix_loss": 3}, "norm_pix_loss=3"),
        ({"dim_model": 3}, "unknown options ['dim_model']"),
    ],
)
def test_options_that_do_not_fit(options, expected, tmp_path):
    assert expected in told(
        tensors_of("cross_scale_mae"), tmp_path, "cross_scale_mae", **options
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"channel_groups": None}, "--channel_groups"),
        ({"channel_groups": ((0, 1, 2), (3, 4))}, "groups of (2, 3) bands"),
        ({"channel_groups": ((0, 1), (1, 2, 3))}, "channel_groups"),
        ({"channel_groups": 3}, "channel_groups=3"),
        ({"channel_groups": (0, 1)}, "channel_groups=(0, 1)"),
    ],
)
def test_groups_that_do_not_fit(options, expected, tmp_path):
    tensors = tensors_of("sat_mae_groups")
    assert expected in told(tensors, tmp_path, "sat_mae_groups", **options)


# Scale-MAE.


def scale_mae(tmp_path, system="scale_mae", **options):
    path = written(tensors_of(system), tmp_path)
    return import_checkpoint(path, **HEADS, **options)


def test_scale_mae_as_published(tmp_path):
    imported = scale_mae(tmp_path)
    model, loss = imported.config.model, imported.config.loss
    assert (model.position, model.reference_gsd) == ("gsd", 2.5)
    # The official default, 14 of 448 pixels, means 1 of 32.
    assert loss.high_frequency.cutoff * SIZE * 2 == 1
    assert loss.low_frequency.through == 0
    assert loss.high_frequency.absolute is True
    assert imported.config.mean == official_bands.IMAGENET[0]
    unused = "mask_token_decoder, pos_embed, decoder_pos_embed"
    assert imported.notes[1] == f"without effect on any output: {unused}"


def test_an_older_scale_mae(tmp_path):
    tensors = tensors_of("scale_mae")
    del tensors["mask_token_decoder"]
    import_checkpoint(written(tensors, tmp_path), **HEADS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"band_config": (8, 224)}, {"cutoff": 0.25, "through": 224}),
        ({"band_config": [4, 16]}, {"cutoff": 0.125, "through": 0}),
        ({"use_l1_loss": False, "l1_loss_weight": 3.0}, {"absolute": False}),
        ({"l1_loss_weight": 3.0}, {"absolute": True, "weight": 3.0}),
        ({"base_resolution": 10.0}, {"position": "gsd", "reference_gsd": 10.0}),
        ({"absolute_scale": True}, {"position": "fixed"}),
    ],
)
def test_scale_mae_s_options(options, expected, tmp_path):
    config = scale_mae(tmp_path, **options).config
    found = config.model.to_dict() | config.loss.high_frequency.to_dict()
    found["through"] = config.loss.low_frequency.through
    assert {name: found[name] for name in expected} == expected
    if options.get("use_l1_loss") is False:
        assert config.loss.high_frequency.weight == 1.0


def test_absolute_scale_knows_no_gsd(tmp_path):
    encoder = scale_mae(tmp_path, absolute_scale=True).encoder
    images = inputs(original("scale_mae")[1])[0].images[:, 0]
    expected = encoder(images, gsd=jnp.full((3, 2), 1.0))
    np.testing.assert_array_equal(encoder(images, gsd=jnp.full((3, 2), 9.0)), expected)


# The command.


def call(*arguments):
    return convert.main(["convert", *map(str, arguments)])


def flags_of(system):
    return [f"--{k}={v}" for k, v in options_of(system).items()]


def refused(capsys, *arguments):
    """The single line that a wrong call prints."""
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("xsmae: ")
    return lines[0]


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    """`imports(system)`: the folder of its import; tests must not change it."""
    root = tmp_path_factory.mktemp("imports")

    @functools.cache
    def imported(system):
        path = written(tensors_of(system), root, f"{system}.safetensors")
        out = root / system
        assert (
            call("import", f"--source={path}", f"--out={out}", *flags_of(system)) == 0
        )
        return out

    return imported


def test_what_is_printed_and_written(tmp_path, capsys):
    path, out = written(tensors_of("mae"), tmp_path), tmp_path / "out"
    assert call("import", f"--source={path}", f"--out={out}", *flags_of("mae")) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "mae, 0.02 M parameters (network): patch size 4, width 24, depth 2, 3 heads, "
        "pre-norm; images of 16 px, 3 bands",
        "not in the file, set as published: mask_ratio, norm_pix_loss",
        "computed, not learned: pos_embed, decoder_pos_embed (checked)",
        "all other tensors were imported",
        f"encoder: {out / 'encoder'}",
        f"to continue pretraining: --config.init={out}",
    ]
    info = json.loads((out / "encoder" / "encoder.json").read_text())
    assert info["run"]["method"] == "mae"
    assert info["run"]["import"] == "x.safetensors"
    assert len(info["run"]["sha256"]) == 64
    assert info["mean"] == list(official_bands.IMAGENET[0])
    images = np.random.default_rng(0).random((2, SIZE, SIZE, 3))
    loaded = xsmae.load_encoder(out)
    normalized = (images - info["mean"]) / info["std"]
    np.testing.assert_allclose(
        loaded.tokens(images),
        original("mae")[0].encoder(jnp.asarray(normalized, jnp.float32)),
        atol=1e-5,
    )


def test_an_encoder_alone_is_written(tmp_path, capsys):
    names = [w.name for w in encoder_weights(original("mae")[1])]
    tensors = {name: tensors_of("mae")[name] for name in [*names, "pos_embed"]}
    path, out = written(tensors, tmp_path), tmp_path / "out"
    assert call("import", f"--source={path}", f"--out={out}", "--num_heads=3") == 0
    printed = capsys.readouterr().out
    assert "(encoder)" in printed
    assert "--config.init" not in printed
    assert [p.name for p in out.iterdir()] == ["encoder"]


def test_other_bands_need_their_names(tmp_path, capsys):
    path, out = written(tensors_of("sat_mae_groups"), tmp_path), tmp_path / "out"
    command = [
        "import",
        f"--source={path}",
        f"--out={out}",
        *flags_of("sat_mae_groups"),
    ]
    names = "--bands=a,b,c,d,e"
    for more in ([], [names]):
        line = refused(capsys, *command, *more)
        assert "5 bands" in line
        assert all(f"--{name}" in line for name in ("bands", "mean", "std"))
    command.append("--std=1,1,1,1,2")
    line = refused(capsys, *command, names, "--mean=1,2,3")
    assert "--mean has 3, expected 5" in line
    line = refused(capsys, *command, "--bands=a,b", "--mean=0,0,0,0,0")
    assert "--bands has 2, expected 5" in line
    line = refused(capsys, *command, names, "--mean=0,0,x,0,0")
    assert "--mean=0,0,x,0,0" in line
    assert not out.exists()
    assert call(*command, names, "--mean=0.1,0,0,0,0") == 0
    info = json.loads((out / "encoder" / "encoder.json").read_text())
    assert info["bands"] == list("abcde")
    assert (info["mean"][0], info["std"][4]) == (0.1, 2.0)
    assert json.loads((out / "config.json").read_text())["bands"] == list("abcde")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing given, expected import or export"),
        (["convert"], "convert given, expected import or export"),
        (["import"], "--source is missing"),
        (["import", "--source=x.pth"], "--out is missing"),
        (["import", "--source=x.pth", "--out={}/new"], "x.pth: does not exist"),
        (["import", "--source=x.pth", "--out={}"], "exists already"),
        (["import", "--source=x.pth", "--out={}/file"], "exists already"),
        (["import", "--source=x.pth", "--out={}/new", "more"], "more"),
        (["import", "--sorce=x.pth"], "sorce"),
        (
            ["import", "--source=x", "--out={}/new", "--num_heads=many"],
            "num_heads=many",
        ),
        (["import", "--source={}/file", "--out={}/new"], "file: "),
        (["export", "--source=x", "--out={}/new"], "--format is missing"),
        (["export", "--source=x", "--out={}/new", "--gsd=fine"], "gsd"),
    ],
)
def test_wrong_calls(arguments, expected, tmp_path, capsys):
    (tmp_path / "file").write_text("no weights")
    arguments = [a.replace("{}", str(tmp_path)) for a in arguments]
    assert expected in refused(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help(capsys):
    assert call("--help") == 0
    printed = capsys.readouterr().out
    for name in ("--source", "--channel_groups", "--format", "--gsd", "--image_size"):
        assert name in printed


# Runs that start from an import.

RUN = [
    "--config.data.num_images=30",
    "--config.data.size=32",
    "--config.model.dtype=float32",
    "--config.batch_size=6",
    "--config.num_steps=2",
    "--config.optim.warmup_steps=0",
    "--config.knn.every=-1",
    "--config.figures.samples=2",
    "--config.tensorboard=False",
]


def config_of(argument, directory, *more):
    """A small config with the fields of the weights, and the lines about changes."""
    arguments = [f"--config=configs/quickstart.py:{argument}", *RUN, *more]
    arguments.append(f"--config.init={directory}")
    config = parse(["xsmae", *arguments], main.define_flags).config
    return config, adopt(config, given_fields(arguments))


ARGUMENTS = {
    "mae": "method=mae",
    "scale_mae": "method=scale_mae",
    "cross_scale_mae": "corrected",
    "cross_scale_mae_xformers": "published",
}


def abstract_state(config):
    """A state of zeros with the right shapes."""
    trainer = create_trainer(config, num_images=30)
    shapes = jax.eval_shape(trainer.initial_state)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@pytest.mark.parametrize("system", ARGUMENTS)
def test_step_0_is_the_import(system, imports):
    config, changes = config_of(ARGUMENTS[system], imports(system))
    assert any(change.startswith("model.embed_dim 192 -> 24") for change in changes)
    assert config.views.size == SIZE
    weights = load_weights(config.init, abstract_state(config))
    network = original(system)[0]
    found = leaves(weights["params"]) | leaves(weights["batch_stats"])
    assert found.keys() == leaves(network).keys()
    for path, leaf in leaves(network).items():
        np.testing.assert_array_equal(found[path], leaf)


def test_fields_that_are_given_stay(imports):
    more = ["--config.model.mask_ratio=0.5", "--config.mean=(0.5,0.5,0.5)"]
    config, changes = config_of("method=mae", imports("mae"), *more)
    assert config.model.mask_ratio == 0.5
    assert config.mean == (0.5, 0.5, 0.5)
    assert config.std == official_bands.IMAGENET[1]
    assert config.model.dtype == "float32"
    fields = [change.split()[0] for change in changes]
    assert {"model.depth", "views.size"} <= set(fields)
    assert {"model.mask_ratio", "mean", "model.dtype"}.isdisjoint(fields)


def run(capsys, argument, *more):
    config = f"--config=configs/quickstart.py:{argument}"
    status = main.main(["xsmae", config, *RUN, *more])
    return status, capsys.readouterr()


def test_training_goes_on_from_an_import(imports, tmp_path, capsys):
    """With a vanishing rate the weights stay those of the import."""
    first = tmp_path / "first"
    rate = "--config.optim.learning_rate=1e-30"
    status, printed = run(
        capsys,
        "method=mae",
        f"--config.init={imports('mae')}",
        f"--workdir={first}",
        rate,
    )
    assert status == 0, printed.err
    assert "model.embed_dim 192 -> 24" in printed.out
    assert [r["step"] for r in read_jsonl(first / "metrics.jsonl")] == [1, 2]
    names = "encoder/encoder.safetensors"
    before, after = (load_file(d / names) for d in (imports("mae"), first))
    assert_same(after.values(), [before[name] for name in after])
    # The next run starts from this one, whose own config then has the sizes.
    config, changes = config_of("method=mae", first)
    assert any(change.startswith("model.embed_dim 192 -> 24") for change in changes)
    again = load_weights(first, abstract_state(config))
    for path, leaf in leaves(again["params"]).items():
        np.testing.assert_array_equal(leaf, leaves(original("mae")[0])[path])


@pytest.mark.parametrize("left", ["nothing", "another config"])
def test_a_run_resumes_without_the_folder_of_its_weights(
    imports, left, tmp_path, capsys
):
    weights, workdir = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(imports("mae"), weights)
    command = [f"--config.init={weights}", f"--workdir={workdir}"]
    command.append("--config.checkpoint.every=1")
    status, printed = run(capsys, "method=mae", *command)
    assert status == 0, printed.err
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.rmtree(weights)
    if left == "another config":
        weights.mkdir()
        (weights / "config.json").write_text('{"method": "mae", "model": {"depth": 9}}')
    status, printed = run(capsys, "method=mae", *command)
    assert status == 0, printed.err
    assert [r["step"] for r in read_jsonl(workdir / "metrics.jsonl")] == [1, 2]
    assert run(capsys, "method=mae", *command, "--dry_run")[0] == 0
    # Changes by the command itself are still refused.
    for change, said in (
        ("--config.seed=5", "seed was 0, is 5"),
        ("--config.model.mask_ratio=0.5", "model.mask_ratio was 0.75, is 0.5"),
        (f"--config.init={tmp_path / 'x'}", f"is '{tmp_path / 'x'}'"),
    ):
        status, printed = run(capsys, "method=mae", *command, change)
        assert status == 2
        assert said in printed.err
    (workdir / "init.json").write_text("{")
    status, printed = run(capsys, "method=mae", *command)
    assert status == 2
    assert "init.json is damaged" in printed.err
    # A run without a checkpoint still needs the weights.
    shutil.rmtree(workdir / "checkpoints")
    shutil.rmtree(weights, ignore_errors=True)
    status, printed = run(capsys, "method=mae", *command)
    assert status == 2
    assert f"init={weights} has no config.json" in printed.err


@pytest.mark.parametrize(
    ("argument", "more", "expected"),
    [
        ("corrected", [], "method mae, but the config has cross_scale_mae"),
        ("method=mae", ["--config.model.depth=1"], "blocks.fc1.kernel"),
        ("method=mae", ["--config.views.size=18"], "views.size=18"),
    ],
)
def test_weights_that_do_not_fit(argument, more, expected, imports, tmp_path, capsys):
    init = f"--config.init={imports('mae')}"
    workdir = f"--workdir={tmp_path / 'run'}"
    status, printed = run(capsys, argument, init, workdir, *more)
    assert status == 2
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    assert expected in printed.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no config.json with a method"),
        ("[1]", "has no config.json with a method"),
        ("{", "has no config.json with a method"),
        ('{"method": "mae", "model": {"speed": 3}}', "has model.speed"),
        ('{"method": "mae", "loss": {"a": {"b": 3}}}', "has loss.a.b"),
    ],
)
def test_no_import(content, expected, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    init, workdir = f"--config.init={tmp_path}", f"--workdir={tmp_path / 'run'}"
    status, printed = run(capsys, "method=mae", init, workdir)
    assert status == 2
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    assert expected in printed.err


def test_no_checkpoints(imports, tmp_path):
    with pytest.raises(UserError, match=f"init={tmp_path} .*checkpoints"):
        load_weights(tmp_path, None)
    (tmp_path / "checkpoints").mkdir()
    config, _ = config_of("method=mae", imports("mae"))
    with pytest.raises(UserError, match=f"{tmp_path}/checkpoints .*no checkpoint"):
        load_weights(tmp_path, abstract_state(config))


def test_an_encoder_alone_starts_no_run(tmp_path, capsys):
    (tmp_path / "encoder").mkdir()
    status, printed = run(capsys, "method=mae", f"--config.init={tmp_path}")
    assert status == 2
    assert f"init={tmp_path} has only an encoder" in printed.err
