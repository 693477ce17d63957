"""Settings that a run chooses by data, device and length, and its messages."""

import json
import os
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image
from xsmae.configs import common, csv, eurosat, folder, quickstart, uc_merced

from xsmae.cli import pretrain
from xsmae.cli.arguments import parse
from xsmae.config import check_ranges, flatten
from xsmae.data.catalogue import build_source
from xsmae.data.survey import survey
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.process.files import read_jsonl
from xsmae.run import choices, report
from xsmae.run.choices import FIELDS, INTERVALS, fit_warmup, settle
from xsmae.run.workdir import check_outside_data
from xsmae.trainer import create_schedule, create_trainer

OF_RASTERS = ("bands", "dtype", "units", "wavelengths")
# Configs of rasters alone leave these to be chosen.
OF_IMAGES = [name for name in FIELDS if name not in OF_RASTERS]
CPU = [types.SimpleNamespace(platform="cpu", device_kind="cpu")]
TINY = [
    "--config.model.embed_dim=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.model.decoder_embed_dim=8",
    "--config.model.decoder_depth=1",
    "--config.model.decoder_num_heads=2",
    "--config.figures.samples=2",
]


def call(*arguments):
    return pretrain.main(["xsmae", *arguments])


def save(root, sides, colour=(140, 90, 60)):
    """Images of the given (height, width): noise around a colour."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(sides):
        pixels = rng.normal(colour, 12, (height, width, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i:03}.png")
    return root


def config_of(root, argument=None, **changes):
    config = folder.get_config(argument)
    config.data.root, config.data.gsd = str(root), 0.5
    config.update_from_flattened_dict(changes)
    return config


def settled(config, **options):
    source = build_source(config.data)
    found, lines = settle(config, source, **options)
    return flatten(found.to_dict()), lines


def values_of(path):
    return flatten(json.loads((path / "config.json").read_text()))


def test_a_folder_of_small_images(tmp_path):
    config = config_of(save(tmp_path / "images", [(40, 50)] * 24), num_steps=200)
    found, lines = settled(config, devices=CPU)
    assert {n: found[n] for n in OF_IMAGES if n not in ("mean", "std")} == {
        "batch_size": 16, "model.dtype": "float32", "views.size": 40,
        "model.patch_size": 8, "log_every": 10, "checkpoint.every": 40,
        "figures.every": 50, "knn.every": 50,
    }  # fmt: skip
    mean, std = survey(build_source(config.data)).statistics()
    np.testing.assert_allclose(found["mean"], mean, atol=6e-5)
    np.testing.assert_allclose(found["std"], std, atol=6e-5)
    said = "\n".join(lines)
    for name in OF_IMAGES:
        assert f"{name}=" in said
    assert "24 of 24 images" in said
    assert "--config.FIELD=VALUE" in said
    # The given config does not change.
    assert all(flatten(config.to_dict())[name] is None for name in OF_IMAGES)


def test_what_is_set_stays(tmp_path):
    root = save(tmp_path / "images", [(40, 40)] * 8)
    given = {
        "batch_size": 4, "model.dtype": "bfloat16", "views.size": 24,
        "model.patch_size": 12, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        "log_every": 3, "checkpoint.every": 7, "figures.every": 0, "knn.every": -1,
    }  # fmt: skip
    assert given.keys() == set(OF_IMAGES)
    found, lines = settled(config_of(root, **given), devices=CPU)
    assert {n: found[n] for n in OF_IMAGES} == given
    assert lines == []


@pytest.mark.parametrize(
    ("sides", "argument", "changes", "size", "patch"),
    [
        ([(256, 300)], None, {}, 128, 16),
        ([(128, 200)], None, {}, 128, 16),
        ([(120, 120)], None, {}, 112, 16),
        ([(95, 95)], None, {}, 88, 8),
        ([(64, 64)], None, {}, 64, 8),
        ([(32, 32)], None, {}, 32, 8),
        ([(40, 40), (200, 200), (70, 90)], None, {}, 64, 8),  # the median, 70
        ([(256, 256)], None, {"model.patch_size": 14}, 126, 14),
        ([(40, 40)], None, {"views.size": 96}, 96, 16),
        ([(40, 40)], None, {"views.size": 100}, 100, 8),
        ([(128, 128)], "method=scale_mae", {}, 64, 8),  # its crops are 128 px
    ],
)
def test_the_size_of_the_views(tmp_path, sides, argument, changes, size, patch):
    root = save(tmp_path / "images", sides)
    found, _ = settled(config_of(root, argument, **changes), devices=CPU)
    assert (found["views.size"], found["model.patch_size"]) == (size, patch)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("tpu", None, "bfloat16"),
    ],
)
def test_the_dtype_of_the_device(platform, capability, dtype):
    device = types.SimpleNamespace(
        platform=platform, device_kind="x", compute_capability=capability
    )
    found, _ = settle(folder.get_config(), None, devices=[device])
    assert found.model.dtype == dtype


@pytest.mark.parametrize(
    ("images", "devices", "parts", "batch"),
    [
        (1, 1, 1, 1),
        (24, 1, 1, 16),
        (24, 3, 1, 15),
        (24, 2, 4, 16),
        (300, 1, 1, 256),
        (300, 6, 1, 252),
    ],
)
def test_the_batch_of_few_images(images, devices, parts, batch):
    config = folder.get_config()
    config.optim.accumulation_steps = parts
    values, _ = choices._batch_size(config, range(images), CPU * devices)
    assert values == {"batch_size": batch}


def test_the_measured_images_are_a_sample(tmp_path, monkeypatch):
    """Evenly spaced images without bad ones, the same every time."""
    root = save(tmp_path / "images", [(40, 40)] * 12)
    (root / "006.png").write_bytes(b"<html>")
    monkeypatch.setattr(choices, "MEASURED", 4)
    found, lines = settled(config_of(root), devices=CPU)
    assert "measured on 3 of 12 images" in "\n".join(lines)
    assert settled(config_of(root), devices=CPU)[0]["mean"] == found["mean"]
    for path in root.iterdir():
        path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="12 images"):
        settled(config_of(root), devices=CPU)


def test_images_of_one_colour(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), (0, 128, 255)).save(root / f"{name}.png")
    config, _ = settle(config_of(root), build_source(config_of(root).data), devices=CPU)
    assert min(config.std) > 0
    check_ranges(config, 1, of_method=METHODS[config.method].ranges)


def test_without_data_what_is_assumed_is_said():
    for module in (folder, csv):
        config, lines = settle(module.get_config(), None, devices=CPU)
        assert (config.views.size, config.model.patch_size) == (128, 16)
        assert (config.mean, config.std) == common.IMAGENET
        assert config.batch_size == 256
        assert config.log_every is None
        assert sum("assumed" in line for line in lines) == 3
        create_trainer(config, num_images=1000)


@pytest.mark.parametrize(
    ("module", "images", "intervals"),
    [
        (quickstart, 4000, (40, 200, 0, 200)),
        (eurosat, 21_600, (50, 100, 500, 250)),
        (uc_merced, 1890, (50, 500, 1000, 1000)),
    ],
)
def test_configs_of_known_data_have_no_more_to_choose(module, images, intervals):
    config = module.get_config()
    unset = {name for name in OF_IMAGES if flatten(config.to_dict())[name] is None}
    assert unset <= set(INTERVALS)
    found, _ = settle(config, range(images), devices=CPU)
    assert tuple(flatten(found.to_dict())[name] for name in INTERVALS) == intervals


def test_intervals_of_a_run_of_the_paper():
    from xsmae.configs import fmow

    found, _ = settle(fmow.get_config(), range(363_571), devices=CPU)
    flat = flatten(found.to_dict())
    assert [flat[name] for name in INTERVALS] == [50, 1000, 5000, 5000]
    assert found.model.dtype == "bfloat16"


def test_a_number_out_of_range_is_refused_before_it_is_used():
    config = folder.get_config()
    config.batch_size = 0
    with pytest.raises(UserError, match="batch_size=0"):
        settle(config, range(10), devices=CPU)


@pytest.mark.parametrize(
    ("config", "flags", "warmup"),
    [
        ("quickstart", [], (600, 60)),
        ("quickstart", ["num_steps=5"], (5, 0)),
        ("quickstart", ["num_steps=100"], (100, 10)),
        ("quickstart", ["num_steps=900"], (900, 60)),
        ("eurosat", [], (1013, 101)),
        ("eurosat", ["num_steps=5"], (5, 0)),
        ("eurosat", ["num_epochs=0.1"], (34, 3)),
        ("uc_merced", ["num_epochs=150"], (5063, 338)),
        ("uc_merced", ["num_steps=50", "optim.warmup_steps=20"], (50, 20)),
    ],
)
def test_the_warmup_is_part_of_the_run(config, flags, warmup):
    arguments = [f"--config.{flag}" for flag in flags]
    values = parse(
        ["xsmae", f"--config=configs/{config}.py", *arguments], pretrain.define_flags
    )
    lines = fit_warmup(values.config, [flag.partition("=")[0] for flag in flags])
    schedule = create_schedule(values.config, num_images=21_600)
    if config == "uc_merced":
        schedule = create_schedule(values.config, num_images=2160)
    assert (schedule.num_steps, schedule.warmup_steps) == warmup
    assert all("optim.warmup_" in line for line in lines)


@pytest.fixture
def run_of(tmp_path):
    root = save(tmp_path / "images", [(40, 40)] * 12)
    workdir = tmp_path / "run"
    return [
        "--config=configs/folder.py:method=mae", f"--config.data.root={root}",
        "--config.data.gsd=0.5", "--config.num_steps=3", f"--workdir={workdir}", *TINY,
    ], root, workdir  # fmt: skip


def test_a_resumed_run_keeps_what_it_chose(run_of, tmp_path, monkeypatch, capsys):
    run, _, workdir = run_of
    assert call(*run, "--config.checkpoint.every=1") == 0
    printed = capsys.readouterr().out
    assert " 8 samples each" in printed
    assert "attention xla (" in printed
    assert "upsampled: 100% of view 1" in printed
    before = values_of(workdir)
    rows = read_jsonl(workdir / "metrics.jsonl")
    # Resume from step 2; any measurement or choice would fail now.
    (workdir / "checkpoints" / "3").rename(tmp_path / "3")
    monkeypatch.setattr(choices, "survey", None)
    monkeypatch.setattr(choices, "_dtype", None)
    assert call(*run, "--config.checkpoint.every=1") == 0
    printed = capsys.readouterr().out
    assert "resuming from step 2" in printed
    assert "start of this run: batch_size=8" in printed
    assert "chosen" not in printed
    assert values_of(workdir) == before
    losses = [row["loss"] for row in rows if "loss" in row]
    again = [r["loss"] for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
    assert again == losses
    # An explicit value wins if it may change, and is refused otherwise.
    assert call(*run, "--config.log_every=2") == 0
    assert values_of(workdir)["log_every"] == 2
    assert call(*run, "--config.views.size=16") == 2
    assert "views.size was 40, is 16" in capsys.readouterr().err


def test_a_run_from_before_there_were_choices_resumes(run_of, capsys):
    """The config.json of an old run has the values of its time."""
    run, _, workdir = run_of
    old = [
        "--config.batch_size=4", "--config.views.size=64",
        "--config.mean=(0.4,0.4,0.4)", "--config.std=(0.2,0.2,0.2)",
        "--config.model.patch_size=16", "--config.optim.warmup_steps=1",
    ]  # fmt: skip
    assert call(*run, *old) == 0
    before = values_of(workdir)
    assert call(*run) == 0
    assert "complete at step 3" in capsys.readouterr().out
    assert values_of(workdir) == before


def test_too_long_a_warmup_that_is_given_is_refused(run_of, capsys):
    run, _, workdir = run_of
    assert call(*run, "--config.optim.warmup_steps=3") == 2
    assert "warm-up of 3 steps in a run of 3" in capsys.readouterr().err
    assert not workdir.exists()


def test_a_dry_run_says_what_it_assumes(run_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("--config=configs/folder.py:method=mae", "--dry_run", *TINY) == 0
    printed = capsys.readouterr().out
    assert "data.root not set yet" in printed
    assert "views.size=128, model.patch_size=16" in printed
    assert printed.count("assumed") >= 2
    run, _, workdir = run_of
    assert call(*run, "--dry_run") == 0
    assert "measured on 12 of 12 images" in capsys.readouterr().out
    assert not workdir.exists()


@pytest.mark.parametrize("place", ["root", "inside", "link", "linked class"])
def test_a_workdir_in_the_data_is_refused(run_of, tmp_path, place, capsys):
    run, root, _ = run_of
    if place == "linked class":
        root.rename(tmp_path / "elsewhere")
        root.mkdir()
        (root / "class").symlink_to(tmp_path / "elsewhere")
        workdir = tmp_path / "elsewhere" / "run"
    elif place == "link":
        (tmp_path / "link").symlink_to(root)
        workdir = tmp_path / "link" / "run"
    else:
        workdir = root if place == "root" else root / "runs" / "one"
    before = sorted(tmp_path.rglob("*"))
    assert call(*run, f"--workdir={workdir}") == 2
    line = capsys.readouterr().err
    assert "--workdir" in line
    assert str(workdir) in line
    assert line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_workdirs_that_disturb_no_data(tmp_path):
    root = save(tmp_path / "images", [(40, 40)])
    data = {"source": "folder", "root": str(root)}
    for path in (tmp_path / "run", tmp_path / "images2", root / ".runs" / "one"):
        check_outside_data(path, data, ["000.png"], flag="--workdir")
    # A table has only the images that it lists.
    table = {"source": "csv", "root": str(root)}
    check_outside_data(root / "run", table, ["000.png"], flag="--workdir")
    with pytest.raises(UserError, match="--out"):
        check_outside_data(root / "report", data, flag="--out")


def test_check_data_writes_no_pictures_into_the_data(tmp_path, capsys):
    from xsmae.cli import check_data

    root = save(tmp_path / "images", [(40, 40)])
    flags = ["--data=configs/folder.py", f"--data.root={root}", "--data.gsd=1"]
    assert check_data.main(["xsmae", *flags, f"--out={root / 'report'}"]) == 2
    assert "--out" in capsys.readouterr().err
    assert os.listdir(root) == ["000.png"]


def test_views_that_are_finer_than_their_images(tmp_path):
    def line(side, size, area=(0.25, 1.0)):
        root = save(tmp_path / f"{side}", [(side, side)])
        changes = {"views.size": size, "views.area": area, "batch_size": 1}
        config = config_of(root, "method=mae", **changes)
        return report.finer_views(config, build_source(config.data))

    assert line(200, 64) == ""
    assert "100% of view 1" in line(40, 64)
    # Areas are uniform from 0.25 to 1 of 200 px: below 128 px means f < 0.41.
    share = int(re.search(r"(\d+)% of view 1", line(200, 128))[1])
    assert share == pytest.approx(100 * (0.4096 - 0.25) / 0.75, abs=5)
    assert "view 2" not in line(200, 128)


def test_the_line_of_what_runs(tmp_path):
    config = config_of(
        save(tmp_path / "images", [(40, 40)] * 8), "method=mae,size=tiny"
    )
    config, _ = settle(config, build_source(config.data))
    trainer = create_trainer(config, num_images=8)
    line = report.execution(config, trainer)
    devices = jax.device_count()
    assert line.startswith(f"{devices} x ")
    assert f"{config.batch_size // devices} samples each" in line
    for text in (config.model.dtype, "attention ", "remat elementwise", "scanned"):
        assert text in line
    config.model.attention, config.model.scan = "xla", False
    line = report.execution(config, trainer)
    assert "attention xla," in line
    assert "unrolled" in line
