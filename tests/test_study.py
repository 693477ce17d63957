"""The head-to-head study: shared settings of its systems, its runs, its tables."""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from studies import config as systems
from studies import finished, head_to_head, report
from xsmae.config import flatten
from xsmae.evaluation.rows import read
from xsmae.methods import METHODS
from xsmae.planning.step import products
from xsmae.planning.topology import TPUS, Topology

ROOT = Path(__file__).parent.parent
COMPARED = [system for system in systems.SYSTEMS if "-" not in system]
SHARED = ("data", "mean", "std", "bands", "optim", "input")
LOCAL = Topology(TPUS["v5e"], jax.devices()[:1], 1)  # its chip has no effect here
SMALL = (
    "--change=--config.num_steps=2",
    "--change=--config.optim.warmup_steps=1",
    "--change=--config.batch_size=4",
    "--change=--config.model.depth=1",
    "--change=--config.model.embed_dim=24",
    "--change=--config.checkpoint.every=1",
    "--change=--config.tensorboard=false",
)


def fields(system):
    return flatten(systems.get_config(system).to_dict())


@pytest.mark.parametrize("system", systems.SYSTEMS)
def test_systems_differ_in_nothing_but_the_method(system):
    config, mae = systems.get_config(system), systems.get_config("mae")
    for name in SHARED:
        theirs, ours = (c.get(name) for c in (mae, config))
        if name == "optim":
            theirs, ours = (o.to_dict() for o in (theirs, ours))
            for one in (theirs, ours):
                # The peak rate is the rate times batch / learning_rate_batch.
                assert one.pop("learning_rate_batch") in (64, 128)
                one.pop("warmup_steps")
            assert config.optim.learning_rate_batch == config.batch_size
            assert config.optim.warmup_steps == config.num_steps // 10
        assert ours == theirs, name
    views = METHODS[config.method].num_views
    assert config.batch_size * views == systems.VIEWS_A_STEP
    for name in ("embed_dim", "depth", "num_heads", "patch_size"):
        assert config.model[name] == mae.model[name]
    assert config.model.get("mask_ratio", 0.75) == mae.model.mask_ratio
    assert (config.views.size, config.model.patch_size) == (64, 8)


@pytest.mark.parametrize("system", systems.A_STEP)
def test_the_arithmetic_of_a_step(system):
    config = systems.get_config(system)
    counted = products(config, LOCAL) / 1e9
    assert counted == pytest.approx(systems.A_STEP[system], abs=0.01)
    if system in systems.STEPS:
        spent = config.num_steps * counted
        assert spent == pytest.approx(systems.ARITHMETIC, rel=5e-3)


def test_long_runs_have_equal_arithmetic():
    """Compared by the arithmetic of a step, which the test above has shown."""
    cost = {
        name: steps / systems.STEPS[name.removesuffix("-long")]
        for name, steps in systems.LONG.items()
    }
    assert max(cost.values()) < 1.005 * min(cost.values())


@pytest.mark.parametrize("name", systems.ABLATIONS)
def test_an_ablation_is_as_published_or_a_loss_left_out(name):
    base, published = fields("corrected"), fields("published-post")
    changed = fields(f"corrected-{name}")
    differing = {k for k in base if changed[k] != base[k]}
    assert differing == systems.ABLATIONS[name].keys()
    for field in differing:
        assert changed[field] in (published[field], 0.0)


def test_the_ablations_are_all_that_presets_differ_in():
    base, published = fields("corrected"), fields("published-post")
    ablated = {field for changes in systems.ABLATIONS.values() for field in changes}
    assert {k for k in base if base[k] != published[k]} <= ablated | {
        "model.projection_dim"
    }


def test_unknown_system():
    with pytest.raises(ValueError, match="expected one of mae"):
        systems.get_config("byol")


def test_a_run_is_of_the_fields_that_it_had():
    fields = head_to_head.fields_of("mae")
    run = {"fields": {k: v for k, v in fields.items() if k != "optim.beta2"}}
    assert head_to_head.is_of(run, fields)  # a field added since the run
    # Other execution fields are the same run; another dtype is not.
    assert head_to_head.is_of({"fields": {**fields, "model.remat": "full"}}, fields)
    for changed in ({"num_steps": 1}, {"gone": 1}, {"model.dtype": "bfloat16"}):
        assert not head_to_head.is_of({"fields": {**fields, **changed}}, fields)
    assert not head_to_head.is_of(
        {"fields": head_to_head.fields_of("mae", ["--x"])}, fields
    )
    assert not head_to_head.is_of(
        {"fields": fields}, head_to_head.fields_of("corrected")
    )


def test_every_run_is_planned_once():
    runs = head_to_head.plan((0, 1, 2))
    assert len(set(runs)) == len(runs)
    for system in (*COMPARED, *head_to_head.CONTESTED):
        assert {(system, seed) for seed in (0, 1, 2)} <= set(runs)
    assert {system for system, _ in runs} == set(systems.SYSTEMS)


@pytest.fixture
def archives(tmp_path):
    """The smallest possible zips and lists of two classes."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    (data / "splits").mkdir(parents=True)
    for one in head_to_head.DATA_SETS:
        lists = {"train": [], "test": []}
        with zipfile.ZipFile(data / f"{one.name}.zip", "w") as file:
            for label, colour in (("field", 90), ("roof", 160)):
                for index in range(56):  # gives a bank of more than k images
                    name = f"{label}/{index:02}.png"
                    lists["test" if index % 4 == 3 else "train"].append(name)
                    image = rng.normal(colour, 20, (64, 64, 3)).clip(0, 255)
                    with file.open(f"{one.folder}/{name}", "w") as entry:
                        Image.fromarray(image.astype(np.uint8)).save(entry, "PNG")
        for part, names in lists.items():
            path = data / f"splits/{one.name}_{part}.txt"
            path.write_text("\n".join(names) + "\n")
    return data


def test_a_run_from_the_zips_to_the_tables(archives, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(head_to_head.TASKS, "knn", {"scales": (25.0, 100.0)})
    soon = {"scales": (100.0,), "penalties": (1.0, 10.0)}
    monkeypatch.setitem(head_to_head.TASKS, "linear_probe", soon)
    folder, results = tmp_path / "work", tmp_path / "results"
    command = ["study", f"--data={archives}", f"--folder={folder}", "--seeds=3", *SMALL]
    command += [f"--results={results}", "--only=corrected"]
    assert head_to_head.main(command) == 0
    # No test image is used for training.
    trained = (folder / "train.csv").read_text()
    for one in head_to_head.DATA_SETS:
        tested = (folder / f"{one.name}_test.txt").read_text().split()
        assert len(tested) == 28
        assert not any(f"{one.folder}/{name}" in trained for name in tested)
    bank = (folder / "eurosat_rgb_bank.txt").read_text().split()
    assert len(bank) == 84 // head_to_head.BANK_EVERY
    (run,) = head_to_head.read_runs(results / "runs.jsonl")
    assert (run["system"], run["seed"], run["steps"]) == ("corrected", 3, 2)
    assert (run["images"], run["views"]) == (8, 16)
    capsys.readouterr()
    before = (results / "knn.jsonl").read_bytes()
    assert head_to_head.main(command) == 0
    assert "corrected/3: finished" in capsys.readouterr().out
    assert (results / "knn.jsonl").read_bytes() == before

    for file in results.iterdir():
        assert str(tmp_path) not in file.read_text()

    study = finished.load(results)
    text = report.tables(study)
    (row,) = (
        row
        for row in read(results / "knn.jsonl")
        if row.encoder["digest"] == run["encoder"]
        and row.protocol.data["name"] == "uc_merced_jpeg90"
        and (row.feature, row.scale) == ("mean", 25.0)
    )
    cell = f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"
    assert cell in text.partition("### uc_merced")[2]
    report.draw(study, tmp_path / "scales.png")
    with Image.open(tmp_path / "scales.png") as picture:
        assert picture.size > (500, 300)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data=DIR is missing"),
        (["--data=nowhere"], "eurosat_rgb.zip does not exist"),
        (["--data=nowhere", "--only=byol"], "--only=byol, expected"),
        (["--data=nowhere", "--seeds=a"], "invalid literal"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, tmp_path, capsys):
    folders = [f"--folder={tmp_path}", f"--results={tmp_path}"]
    assert head_to_head.main(["study", *folders, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_page_has_the_tables_of_the_committed_rows():
    page = (ROOT / "docs" / "study.md").read_text()
    study = finished.load(ROOT / "studies" / "results")
    assert report.replace_tables(page, study) == page
    digests = {row.encoder["digest"] for row in study.rows["knn"]}
    for run in study.runs:
        assert run["encoder"] in digests
        assert json.dumps(run)
        # The runs have the current fields of these systems.
        assert head_to_head.is_of(run, head_to_head.fields_of(run["system"]))


def test_changes_with_more_seeds_are_means_of_their_own_rows():
    results = ROOT / "studies" / "results"
    text = report.contested_table(finished.load(results))
    (line,) = (x for x in text.splitlines() if x.startswith("| none |"))
    runs = head_to_head.read_runs(results / "runs.jsonl")
    digests = {run["encoder"] for run in runs if run["system"] == "corrected"}
    values = [
        100 * row["value"]
        for row in map(json.loads, (results / "knn.jsonl").read_text().splitlines())
        if row["encoder"]["digest"] in digests
        and row["protocol"]["data"]["name"] == "eurosat_rgb"
        and (row["feature"], row["scale"]) == ("mean", "average")
    ]
    assert len(values) == len(digests) == 3
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "0, 1, 2"
    assert cells[3] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
