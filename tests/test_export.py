"""Exports of an encoder; tests/peers loads them in the other frameworks."""

import json
import os
import stat

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import xsmae
from tests.support.encoders import make_encoder
from xsmae.cli import convert
from xsmae.errors import UserError
from xsmae.weights.export import export

BLOCK = {
    "timm": {
        "blocks.1.attn.qkv.weight": (48, 16),
        "blocks.1.attn.qkv.bias": (48,),
        "blocks.1.attn.proj.weight": (16, 16),
        "blocks.1.mlp.fc1.weight": (48, 16),
        "blocks.1.mlp.fc2.weight": (16, 48),
        "blocks.1.norm2.weight": (16,),
        "patch_embed.proj.weight": (16, 3, 4, 4),
        "patch_embed.proj.bias": (16,),
        "pos_embed": (1, 17, 16),
        "cls_token": (1, 1, 16),
        "norm.bias": (16,),
    },
    "huggingface": {
        "encoder.layer.1.attention.attention.query.weight": (16, 16),
        "encoder.layer.1.attention.attention.value.bias": (16,),
        "encoder.layer.1.attention.output.dense.weight": (16, 16),
        "encoder.layer.1.intermediate.dense.weight": (48, 16),
        "encoder.layer.1.output.dense.weight": (16, 48),
        "encoder.layer.1.layernorm_after.weight": (16,),
        "embeddings.patch_embeddings.projection.weight": (16, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (16,),
        "embeddings.position_embeddings": (1, 17, 16),
        "embeddings.cls_token": (1, 1, 16),
        "layernorm.bias": (16,),
    },
}
POSITIONS = {"timm": "pos_embed", "huggingface": "embeddings.position_embeddings"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """An encoder with positions scaled by the GSD."""
    return make_encoder(tmp_path_factory.mktemp("scaled"), position="gsd")


def exported(source, out, format, **options):
    notes = export(source, out, format=format, **options)
    tensors = load_file(out / "model.safetensors")
    return tensors, json.loads((out / "config.json").read_text()), notes


@pytest.mark.parametrize("format", BLOCK)
def test_names_and_shapes(format, source, tmp_path):
    tensors, _, _ = exported(source, tmp_path, format)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert BLOCK[format].items() <= shapes.items()
    per_block = 12 if format == "timm" else 16
    assert len(tensors) == 2 * per_block + 6
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}


def test_others_may_read_the_files(tmp_path):
    """Every file has the mode that the umask gives to a new one."""
    before = os.umask(0o022)
    try:
        source = make_encoder(tmp_path / "encoder")
        for format in BLOCK:
            export(source, tmp_path / format, format=format)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_both_formats_hold_the_same_numbers(source, tmp_path):
    timm, _, _ = exported(source, tmp_path / "timm", "timm")
    theirs, _, _ = exported(source, tmp_path / "huggingface", "huggingface")
    for end in ("weight", "bias"):
        thirds = [
            theirs[f"encoder.layer.1.attention.attention.{name}.{end}"]
            for name in ("query", "key", "value")
        ]
        np.testing.assert_array_equal(
            timm[f"blocks.1.attn.qkv.{end}"], np.concatenate(thirds)
        )
        for ours, name in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
        ):
            np.testing.assert_array_equal(
                timm[f"blocks.0.{ours}.{end}"], theirs[f"encoder.layer.0.{name}.{end}"]
            )
    np.testing.assert_array_equal(
        timm["pos_embed"], theirs["embeddings.position_embeddings"]
    )
    # timm's tensors are also those of the encoder's own file.
    ours = load_file(source / "encoder.safetensors")
    assert ours.keys() == timm.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(timm[name], tensor)


def test_timm_s_config(source, tmp_path):
    _, config, notes = exported(source, tmp_path, "timm")
    assert config["num_features"] == 16
    assert config["model_args"] == {
        "global_pool": "avg",
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 3,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 3.0,
        "fc_norm": False,
        "final_norm": True,
    }
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert "images of 16 px, bands red, green, blue, in 0-1" in notes[-1]


def test_hugging_face_s_config(source, tmp_path):
    _, config, _ = exported(source, tmp_path, "huggingface", image_size=24)
    expected = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 24,
        "patch_size": 4,
        "num_channels": 3,
        "qkv_bias": True,
        "mask_ratio": 0.0,
    }
    assert expected.items() <= config.items()
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 24, "width": 24}
    assert processor["image_std"] == [0.2] * 3
    assert processor["rescale_factor"] == 1 / 255


def test_without_the_last_norm(tmp_path):
    source = make_encoder(tmp_path / "source", encoder_norm=False)
    tensors, config, notes = exported(source, tmp_path / "timm", "timm")
    assert config["model_args"]["final_norm"] is False
    assert not [name for name in tensors if name.startswith("norm.")]
    assert "last norm" in notes[0]
    with pytest.raises(UserError, match=r"last norm.*huggingface.*--format=timm"):
        export(source, tmp_path / "out", format="huggingface")


def test_other_bands(tmp_path):
    source = make_encoder(tmp_path / "source", bands=("red", "nir"))
    tensors, config, _ = exported(source, tmp_path / "out", "timm")
    assert config["model_args"]["in_chans"] == 2
    assert tensors["patch_embed.proj.weight"].shape == (16, 2, 4, 4)


@pytest.mark.parametrize("format", POSITIONS)
def test_positions_of_a_gsd(format, scaled, tmp_path):
    tensors, _, notes = exported(scaled, tmp_path, format, gsd=0.5, image_size=8)
    written = tensors[POSITIONS[format]]
    assert written.shape == (1, 5, 16)
    positions = xsmae.load_encoder(scaled).network.positions
    expected = positions((2, 2), gsd=jnp.full((1, 2), 0.5))
    np.testing.assert_array_equal(written[:, 1:], expected)
    np.testing.assert_array_equal(written[:, 0], 0)
    # The second patch lies at 0.5 / 2.0 of its index.
    np.testing.assert_allclose(written[0, 2, 0], np.sin(0.25), rtol=1e-6)
    assert "positions" in notes[0]
    assert "0.5 m per pixel" in notes[0]


def test_a_gsd_outside_the_training_is_noted(scaled, tmp_path):
    encoder = xsmae.load_encoder(scaled)
    encoder.info["gsd_range"] = [0.5, 2.0]
    inside = export(encoder, tmp_path / "inside", format="timm", gsd=1.0)
    assert not any("trained at" in note for note in inside)
    outside = export(encoder, tmp_path / "outside", format="timm", gsd=8.0)
    assert any("trained at 0.5 to 2 m" in note for note in outside)


@pytest.mark.parametrize("gsd", [None, 0, -1.0, float("nan"), float("inf")])
def test_a_gsd_is_needed(gsd, scaled, tmp_path):
    with pytest.raises(UserError, match="give --gsd=METRES"):
        export(scaled, tmp_path / "out", format="timm", gsd=gsd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_style": "post", "norm_epsilon": 1e-5}, "a post-norm encoder"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon=1e-05"),
        ({"channel_groups": ((0,), (1, 2)), "group_dim": 4}, "groups of bands"),
    ],
)
@pytest.mark.parametrize("format", BLOCK)
def test_encoders_that_cannot_be_expressed(changes, expected, format, tmp_path):
    source = make_encoder(tmp_path / "source", **changes)
    with pytest.raises(
        UserError, match=f"{expected}.* cannot be expressed in {format}"
    ):
        export(source, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format=onnx"], "--format=onnx, expected one of timm, huggingface"),
        (["--format=timm", "--gsd=1"], "--gsd=1, but"),
        (["--format=timm", "--image_size=18"], "--image_size=18: an image of 18x18 px"),
        (["--format=timm", "--image_size=0"], "--image_size=0, expected"),
        (["--format=timm", "--image_size=-16"], "--image_size=-16, expected"),
        (["--format=timm", "--source=nowhere"], "nowhere has no encoder.json"),
    ],
)
def test_wrong_calls(options, expected, source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["convert", "export", f"--source={source}", f"--out={out}", *options]
    assert convert.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("xsmae: ")
    assert expected in lines[0]
    assert not out.exists()


def test_what_is_printed(scaled, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", f"--source={scaled}", f"--out={out}", "--format=timm"]
    assert convert.main(["convert", *command, "--gsd=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 m per pixel" in lines[0]
    assert lines[1].startswith("images of 16 px, bands red, green, blue")
    assert lines[2] == f"written: {out}"
    assert convert.main(["convert", *command, "--gsd=4"]) == 2
    assert str(out) in capsys.readouterr().err
