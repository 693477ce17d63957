"""The pretraining command, end to end, and everything that it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from xsmae.configs import common

import xsmae
from tests.support.runs import (
    ROOT,
    SMALL_MODEL,
    SMALL_RUN,
    TIMES,
    call,
    comparable,
    for_method,
    refused,
)
from xsmae.cli import pretrain as main
from xsmae.cli.arguments import parse
from xsmae.evaluation.tasks.knn import KnnMonitor
from xsmae.process.files import read_jsonl

# Of images with masks, which are not for pretraining.
MASKS = {"segmentation.py", "dubai.py", "chesapeake.py", "synthetic_land.py"}
CONFIGS = sorted(
    {p.name for p in (ROOT / "configs").glob("[a-z]*.py")} - {"common.py"} - MASKS
)

# All methods, and both presets of Cross-Scale MAE.
ARGUMENTS = (
    "published",
    "corrected",
    "method=mae",
    "method=sat_mae",
    "method=scale_distill",
    "method=scale_mae",
    "method=sigreg",
    "method=simclr",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished small quickstart, and its printed output."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    done = subprocess.run(
        command(workdir), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def command(workdir, *more):
    config = "--config=configs/quickstart.py:corrected,size=tiny"
    return [
        sys.executable, "-m", "xsmae.main", config, f"--workdir={workdir}",
        *SMALL_RUN, *more,
    ]  # fmt: skip


def test_a_run_leaves_what_it_should(finished):
    workdir, printed = finished
    rows = read_jsonl(workdir / "metrics.jsonl")
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [1, 2, 4, 6, 8]
    terms = {"reconstruction", "contrastive", "cross_prediction"}
    last = [row for row in rows if "loss" in row][-1]
    assert {f"loss/{term}" for term in terms} < last.keys()
    assert {"learning_rate", *TIMES, "epoch", "rejected"} < last.keys()
    first, *others = (row["waiting_for_data"] for row in rows if "loss" in row)
    assert first is None  # the first step compiles
    assert all(0 <= share <= 1 for share in others)
    assert all(row["schema"] == 1 for row in rows)
    assert "knn/image_statistics" in rows[0]
    assert [row["step"] for row in rows if "knn/accuracy_cls" in row] == [4, 8]
    assert rows[-1].keys() > {"knn_full/accuracy_mean", "knn_full/random_encoder_cls"}
    for name in ("crops", "gsd", "losses", "reconstructions_0000008"):
        with Image.open(workdir / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
        assert f"{name}.png" in printed
    assert json.loads((workdir / "config.json").read_text())["model"]["embed_dim"] == 16
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert list(workdir.glob("events.out.tfevents.*"))
    assert not (workdir / "rejected.jsonl").exists()


def test_checkpoints_that_are_kept(finished):
    kept = sorted(int(p.name) for p in (finished[0] / "checkpoints").iterdir())
    assert kept == [3, 6, 8]


def test_the_table_is_of_the_metrics(finished):
    workdir, printed = finished
    rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
    line = next(x for x in printed.splitlines() if x.startswith("loss "))
    assert line.split()[1:] == [f"{rows[i]['loss']:.4f}" for i in (0, -1)]
    full = read_jsonl(workdir / "metrics.jsonl")[-1]
    line = next(x for x in printed.splitlines() if x.startswith("image statistics"))
    assert f"{100 * full['knn_full/image_statistics']:.1f} %" in line


def test_the_encoder_is_usable(finished):
    encoder = xsmae.load_encoder(finished[0])
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    features = encoder(images, gsd=1.0)
    assert features.shape == (3, 16)
    assert encoder.tokens(images, gsd=1.0).shape == (3, 5, 16)
    assert not np.allclose(features, encoder(images, gsd=2.0))


def test_the_same_command_again_changes_nothing(finished):
    workdir, _ = finished
    before = comparable(workdir)
    again = subprocess.run(command(workdir), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert "complete at step 8" in again.stdout
    assert "resuming" not in again.stdout
    assert comparable(workdir) == before


@pytest.mark.parametrize(
    ("method", "flags", "terms"),
    [
        ("mae", [], {"reconstruction"}),
        (
            "sat_mae",
            [
                "--config.model.channel_groups=((0,),(2,1))",
                "--config.model.group_dim=4",
                "--config.model.decoder_group_dim=4",
            ],
            {"reconstruction"},
        ),
        (
            "scale_mae",
            ["--config.model.head_dim=8"],
            {"low_frequency", "high_frequency"},
        ),
        (
            "scale_distill",
            ["--config.model.teacher=ema"],
            {
                "reconstruction",
                "contrastive",
                "scale_distillation",
                "dense_distillation",
            },
        ),
        (
            "sigreg",
            ["--config.model.projection_hidden_dim=8"],
            {
                "reconstruction",
                "reconstruction_view1",
                "reconstruction_view2",
                "invariance",
                "sigreg",
            },
        ),
        ("simclr", ["--config.model.projection_dim=8"], {"contrastive"}),
    ],
)
def test_the_other_methods_run_the_same_way(method, flags, terms, tmp_path):
    config = f"--config=configs/quickstart.py:method={method}"
    steps = ["--config.num_steps=2", "--config.optim.warmup_steps=1"]
    run = [*for_method(method, SMALL_RUN), *steps, "--config.knn.every=-1", *flags]
    assert call(config, *run, f"--workdir={tmp_path}") == 0
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    found = {n.removeprefix("loss/") for n in rows[-1] if n.startswith("loss/")}
    assert found == terms
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    expected = {"crops.png", "gsd.png", "losses.png"}
    if method != "simclr":
        expected.add("reconstructions_0000002.png")
    assert names == expected
    encoder = xsmae.load_encoder(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    groups = 2 if method == "sat_mae" else 1
    assert encoder.tokens(images, gsd=1.0).shape == (2, 1 + 4 * groups, 16)


def test_killed_runs_end_as_the_uninterrupted_one(finished, tmp_path):
    """SIGKILL twice and SIGTERM once: the final lines are the same."""
    workdir = tmp_path / "killed"
    for seen, number in ((3, signal.SIGKILL), (5, signal.SIGTERM), (6, signal.SIGKILL)):
        process = subprocess.Popen(
            command(workdir), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 200
        while len(read_jsonl(workdir / "metrics.jsonl")) < seen:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, number)
        printed, _ = process.communicate(timeout=100)
        assert process.returncode == (
            -signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM
        )
        if number == signal.SIGTERM:
            assert "the same command" in printed
    assert subprocess.run(command(workdir), cwd=ROOT).returncode == 0
    assert comparable(workdir) == comparable(finished[0])
    ours, theirs = (
        (folder / "encoder" / "encoder.safetensors").read_bytes()
        for folder in (workdir, finished[0])
    )
    assert ours == theirs


@pytest.mark.parametrize("stopped_in", ["monitor", "last monitor", "finish"])
def test_ctrl_c_while_measuring(finished, tmp_path, stopped_in, monkeypatch, capfd):
    """The state is saved, and the skipped measurement happens at the next start."""
    calls = {"monitor": 2, "last monitor": 3, "finish": 4}[stopped_in]
    measured = KnnMonitor.accuracy

    def accuracy(monitor, encode):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return measured(monitor, encode)

    monkeypatch.setattr(KnnMonitor, "accuracy", accuracy)
    workdir = tmp_path / "run"
    arguments = command(workdir)[3:]
    assert call(*arguments) == 130
    assert "SIGINT: stopping" in capfd.readouterr().err
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved == (4 if stopped_in == "monitor" else 8)
    if stopped_in != "finish":  # and once more during that measurement
        calls = 1
        assert call(*arguments) == 130
        assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == saved
    assert call(*arguments) == 0
    assert comparable(workdir) == comparable(finished[0])


def test_worker_processes_change_nothing(finished, tmp_path):
    workdir = tmp_path / "workers"
    run = command(workdir, "--config.input.num_workers=2")
    assert subprocess.run(run, cwd=ROOT, timeout=300).returncode == 0
    assert comparable(workdir) == comparable(finished[0])


def test_the_monitor_may_be_switched_on_later(tmp_path, capsys):
    """The controls are measured then, because table and figure need them."""
    workdir = tmp_path / "run"
    config = "--config=configs/quickstart.py:method=mae"
    run = [config, *SMALL_RUN, f"--workdir={workdir}", "--config.knn.full_at_end=False"]
    assert call(*run, "--config.knn.every=-1") == 0
    assert "kNN" not in capsys.readouterr().out
    for _ in range(2):  # only once, however often the run starts
        assert call(*run, "--config.knn.every=0") == 0
        assert "image statistics alone" in capsys.readouterr().out
    rows = read_jsonl(workdir / "metrics.jsonl")
    for name in ("knn/accuracy_cls", "knn/image_statistics"):
        assert [row["step"] for row in rows if name in row] == [8]


def test_a_refused_start_leaves_the_workdir_free(tmp_path, capsys):
    config = "--config=configs/quickstart.py:method=mae"
    run = [config, *SMALL_RUN, f"--workdir={tmp_path / 'run'}", "--config.knn.every=-1"]
    refused(capsys, *run, "--config.batch_size=64")
    diverging = ["--config.optim.learning_rate=1e38", "--config.optim.warmup_steps=0"]
    refused(capsys, *run, *diverging, "--config.optim.max_nonfinite=1")
    assert call(*run) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert not any(name.startswith("knn") for row in rows for name in row)
    assert "kNN" not in capsys.readouterr().out


def test_a_workdir_of_another_config_is_refused(finished, capsys):
    workdir, _ = finished
    line = refused(
        capsys,
        "--config=configs/quickstart.py:corrected,size=tiny",
        f"--workdir={workdir}",
        *SMALL_RUN,
        "--config.seed=5",
    )
    assert "seed was 0, is 5" in line


def test_a_workdir_of_other_data_is_refused(image_folder, tmp_path, capsys):
    run = [
        "--config=configs/folder.py:method=mae",
        f"--config.data.root={image_folder}",
        "--config.data.gsd=0.5",
        *SMALL_MODEL,
        "--config.num_steps=3",
        "--config.optim.warmup_steps=1",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert call(*run) == 0
    next(image_folder.rglob("*.jpg")).unlink()
    capsys.readouterr()
    assert "fingerprint" in refused(capsys, *run)


def test_a_folder_with_a_bad_image(image_folder, tmp_path, capsys):
    (image_folder / "roof" / "bad.jpg").write_bytes(b"<html>404</html>")
    run = [
        "--config=configs/folder.py:method=mae",
        f"--config.data.root={image_folder}",
        "--config.data.gsd=0.5",
        *SMALL_MODEL,
        "--config.num_steps=6",
        "--config.optim.warmup_steps=1",
        "--config.log_every=1",
    ]
    strict = [*run, "--config.input.max_rejected_fraction=0"]
    line = refused(capsys, *strict, f"--workdir={tmp_path / 'strict'}")
    assert "roof/bad.jpg" in line
    assert "max_rejected_fraction=0)" in line
    workdir = tmp_path / "lenient"
    assert call(*run, f"--workdir={workdir}") == 0
    rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
    assert rows[-1]["rejected"] == 1
    assert sum(row["replaced_in_batch"] for row in rows) >= 1
    listed = (workdir / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in listed] == ["roof/bad.jpg"]
    assert "knn_full/accuracy_cls" in read_jsonl(workdir / "metrics.jsonl")[-1]


def test_a_diverging_run_stops(tmp_path, capsys):
    line = refused(
        capsys,
        "--config=configs/quickstart.py:method=mae",
        *SMALL_RUN,
        "--config.optim.learning_rate=1e38",
        "--config.optim.warmup_steps=0",
        "--config.optim.max_nonfinite=2",
        "--config.checkpoint.every=1",
        "--config.knn.every=0",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "not finite in 2 steps in a row" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.model.depht=3"], "depht"),
        (
            ["--config.mesh.fsdp=8", "--config.model.depth=3"],
            "xsmae: --config.mesh.fsdp=8: there is no such field, mesh is a value",
        ),
        (["--config.batch_size=many"], "many"),
        (["--config.batch_size=1e3"], "1e3"),
        (["--worldir=x"], "worldir"),
        (["extra"], "extra"),
        (["--config.views.size=20"], "views.size=20 is not a multiple"),
        (["--config.views.area=(0.5,2.0)"], "views.area"),
        (["--config.batch_size=31", "--config.data.num_images=30"], "30 images"),
        (["--config.optim.warmup_steps=8"], "warm-up of 8 steps in a run of 8"),
        (["--config.optim.accumulation_steps=3"], "accumulation_steps=3"),
        (["--config.method=mae"], "--config=NAME:method=mae"),
        (["--config.data.source=magic"], "data.source='magic'"),
        (["--config.model.num_heads=3"], "heads"),
        (["--config.model.mask_ratio=0.99"], "mask_ratio=0.99"),
        (["--config.model.norm_style=mid"], "norm_style='mid'"),
        (["--config.model.position=learned"], "position"),
        (["--config.model.dtype=float33"], "float33"),
        (["--config.data.gsd=-1.0"], "gsd"),
        (["--config.log_every=0"], "log_every=0"),
        (["--config.num_steps=0"], "num_steps"),
        (["--config.seed=-1"], "seed=-1"),
        (["--config.figures.samples=0"], "figures.samples=0"),
        (["--config.checkpoint.keep=0"], "checkpoint.keep=0"),
        (["--config.knn.k=0"], "knn.k=0"),
        (["--config.optim.max_nonfinite=0"], "max_nonfinite=0"),
        (["--config.input.num_workers=-1"], "num_workers=-1"),
        (["--config.input.max_rejected_fraction=-0.1"], "max_rejected_fraction=-0.1"),
        (["--config.loss.contrastive.temperature=0.0"], "temperature=0.0"),
        (["--config.loss.contrastive.groups=3"], "groups=3"),
        (["--config.loss.reconstruction.views=max"], "'max'"),
        (["--config.views.area=('a',1)"], "views.area"),
        (["--config.mean=(0.5,)"], "mean"),
        (["--config.model.attention=magic"], "magic"),
        (["--config.model.attention=cudnn"], "expected an NVIDIA GPU"),
        (["--config.model.remat=some"], "remat"),
        (["--config.knn.test.num_images=0"], "--config.knn.every=-1"),
    ],
)
def test_what_is_refused(arguments, expected, tmp_path, capsys):
    config = "--config=configs/quickstart.py:corrected"
    line = refused(
        capsys, config, *SMALL_RUN, f"--workdir={tmp_path / 'run'}", *arguments
    )
    assert expected in line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/nothing.py", "configs/fmow.py"),
        ("elsewhere/fmow.py", "elsewhere/fmow.py"),
        ("configs/common.py", "configs/folder.py"),
        ("configs/fmow.py:publshed", "publshed"),
        ("configs/fmow.py:published,size=giant", "giant"),
        ("configs/fmow.py:published,depth=3", "depth"),
        ("configs/fmow.py", "--config.data.root=..."),
        ("configs/eurosat.py", "--config.data.root=..."),
        ("configs/tfds.py", "data.name, data.data_dir"),
    ],
)
def test_what_config_is_refused(config, expected, capsys):
    assert expected in refused(capsys, f"--config={config}")


def test_no_config_is_refused(capsys):
    assert "xsmae pretrain --config=quickstart" in refused(capsys)


def test_a_missing_gsd_is_told(image_folder, capsys):
    run = ["--config=configs/folder.py", f"--config.data.root={image_folder}"]
    assert "--config.data.gsd=" in refused(capsys, *run)
    table = image_folder.parent / "gsd.csv"
    names = sorted(p.relative_to(image_folder) for p in image_folder.rglob("*.jpg"))
    table.write_text("path,gsd\n" + "".join(f"{name},0.5\n" for name in names))
    run += [f"--config.data.gsd_csv={table}", *SMALL_MODEL]
    assert "--config.model.reference_gsd=" in refused(capsys, *run)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_dry_run(argument, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = for_method(argument.removeprefix("method="), SMALL_MODEL)
    assert call(f"--config=configs/fmow.py:{argument}", *model, "--dry_run") == 0
    printed = capsys.readouterr().out
    both = re.search(r"[\d.]+ M in encoder \+ decoder", printed)
    assert bool(both) == (argument != "method=simclr")
    assert "data.root not set yet" in printed
    size = 32 if argument == "method=scale_mae" else 16
    one = argument in ("method=mae", "method=sat_mae", "method=scale_mae")
    views = 1 if one else 2
    assert f"uint8 [8, {views}, {size}, {size}, 3]" in printed
    assert "GiB temporary" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 9 bytes"),
            "(RESOURCE_EXHAUSTED: allocating 9 bytes)",
        ),
        (MemoryError(), "(MemoryError)"),
    ],
)
def test_too_little_memory_is_told(error, said, monkeypatch, tmp_path, capsys):
    def fail(config, workdir):
        raise error

    monkeypatch.setattr("xsmae.train.train_and_evaluate", fail)
    run = ["xsmae", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    assert main.main(run) == 2
    printed = capsys.readouterr().err
    assert f"too little memory {said}" in printed
    assert "lower --config.batch_size" in printed
    assert printed.count("\n") == 1


def test_dry_run_with_data(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ["--config=configs/folder.py", f"--config.data.root={image_folder}"]
    run = ["--config.data.gsd=0.5", "--config.optim.clip_norm=1.0", *SMALL_MODEL]
    assert call(*config, *run, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "steps: 300, 30 of them warm-up" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("bands", "unknown"),
    [
        (("nir", "swir", "red"), "and no nir, swir:"),
        (("blue", "green", "red"), None),
        (("red", "green"), None),
    ],
)
def test_bands_that_are_not_the_sources(bands, unknown, dry, tmp_path, capsys):
    workdir = tmp_path / "run"
    each = [f"--config.{name}={(0.5,) * len(bands)}" for name in ("mean", "std")]
    line = refused(
        capsys, "--config=configs/quickstart.py:size=tiny", f"--workdir={workdir}",
        *SMALL_RUN, f"--config.bands={bands}", *each, *["--dry_run"] * dry,
    )  # fmt: skip
    assert f"bands={', '.join(bands)}, but SyntheticSource(" in line
    assert "has red, green, blue" in line
    assert "--config.bands=\"('red', 'green', 'blue')\"" in line
    assert (" and no " in line) == (unknown is not None)
    assert unknown is None or unknown in line
    assert not workdir.exists()


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_builds(name, argument):
    from xsmae.run.choices import settle
    from xsmae.trainer import create_sampler, create_trainer

    arguments = [f"--config=configs/{name}:{argument},size=small"]
    if name in ("folder.py", "csv.py", "tfds.py"):
        arguments.append("--config.data.gsd=0.5")
    config = parse(["xsmae", *arguments], main.define_flags).config
    assert config.is_locked
    config, _ = settle(config, None)
    create_sampler(config)
    trainer = create_trainer(config, num_images=100_000)
    state = jax.eval_shape(trainer.initial_state)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 20e6
    assert 0 < trainer.schedule.warmup_steps < trainer.schedule.num_steps
    if argument == "published":  # data sets do not change the published setting
        assert config.loss.contrastive.temperature == 0.5
        assert config.model.position == "fixed"
    assert json.loads(config.to_json())["mean"]


@pytest.mark.parametrize("name", sorted(MASKS))
def test_configs_of_masks_are_not_for_pretraining(name, tmp_path, capsys):
    arguments = [f"--config=configs/{name}", f"--workdir={tmp_path / 'run'}"]
    if name != "synthetic_land.py":
        arguments += [f"--config.data.root={tmp_path}"]
    assert main.main(["xsmae", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "masks" in error or "land" in error
    assert "--config=folder" in error
    assert not (tmp_path / "run").exists()


def test_presets_set_every_row_of_the_reference_table():
    published, corrected = (
        common.get_common(preset, "base") for preset in ("published", "corrected")
    )
    rows = {
        "views.view2_from": ("view1", "source"),
        "views.view2_box": ("batch", "sample"),
        "views.interpolation2": ("bilinear", "bicubic"),
        "model.position": ("fixed", "gsd"),
        "model.encoder_norm": (False, True),
        "model.norm_style": ("post", "pre"),
        "loss.reconstruction.views": ("sum", "mean"),
        "loss.reconstruction.norm_pix_loss": (False, True),
        "model.projection_dim": (0, 128),
        "loss.contrastive.positive_in_denominator": (False, True),
        "loss.contrastive.temperature": (0.5, 0.1),
        "loss.cross_prediction.stop_gradient": (False, True),
        "loss.cross_prediction.aligned": (False, True),
        "model.predictor_norm": ("batch_norm", "layer_norm"),
    }
    for name, expected in rows.items():
        found = []
        for config in (published, corrected):
            value = config
            for part in name.split("."):
                value = value[part]
            found.append(value)
        assert tuple(found) == expected, name
    assert published.model.predictor_hidden_dim == 2048
    assert published.optim.learning_rate == 5e-5


def test_default_workdir_and_config_lookup(tmp_path, monkeypatch):
    found = main.default_workdir(["--config=configs/fmow.py:published,size=large"])
    assert found == Path("runs/fmow-published-size-large")
    found = main.default_workdir(["--seed", "--config", "configs/quickstart.py"])
    assert found == Path("runs/quickstart")
    monkeypatch.chdir(tmp_path)  # without configs/ here, the installed config is used
    assert parse(["xsmae", "--config=configs/fmow.py"], main.define_flags).config.method
    assert (
        parse(
            ["xsmae", "--config", "configs/fmow.py:method=mae"], main.define_flags
        ).config.seed
        == 0
    )


def test_help_lists_the_flags(capsys):
    assert call("--help") == 0
    printed = capsys.readouterr().out
    for name in ("--config", "--workdir", "dry_run", "--config.FIELD=VALUE"):
        assert name in printed
