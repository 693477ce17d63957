"""Figures: written atomically, with plausible sizes and the right pixels."""

import types

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from xsmae.bands import Bands
from xsmae.figures import training as figures
from xsmae.figures.style import end_of
from xsmae.methods import Pictures
from xsmae.run.pictures import GSD_SAMPLES, GsdHistogram

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.1, 0.25)
PATCH, SIZE, SAMPLES = 8, 32, 2
BANDS = Bands(("red", "green", "blue"), MEAN, STD)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make_views(rng, num_views):
    """Views as 0-255 and normalised, with 25 % of their patches visible."""
    shape = (SAMPLES, num_views, SIZE, SIZE, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    images = ((pixels / 255 - MEAN) / STD).astype(np.float32)
    order = rng.random((SAMPLES, num_views, (SIZE // PATCH) ** 2)).argsort(-1)
    return pixels, images, (order >= 4).astype(np.float32)


def read_png(path):
    """The figure. It must be the only file in its folder: no temporary file is left."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def drawn_lines(monkeypatch):
    """The (y values, label) of every line plotted since."""
    lines, plot = [], matplotlib.axes.Axes.plot

    def record(self, *args, **options):
        lines.append((np.asarray(args[1], float), options.get("label")))
        return plot(self, *args, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    return lines


def test_to_pixels_by_hand():
    images = np.array([[0, 1, -1], [0.5, 0, 20], [np.nan, 0, 0]], np.float32)
    expected = [[0.4, 0.6, 0.05], [0.5, 0.5, 1.0], [0.0, 0.5, 0.3]]
    np.testing.assert_allclose(figures.to_pixels(images, BANDS), expected, rtol=1e-6)


@pytest.mark.parametrize("num_views", [1, 2])
def test_reconstructions(tmp_path, rng, num_views):
    _, images, mask = make_views(rng, num_views)
    path = tmp_path / "new" / "folder" / "reconstructions.png"
    hidden = mask.reshape(SAMPLES, num_views, SIZE // PATCH, SIZE // PATCH)
    hidden = hidden.repeat(PATCH, axis=2).repeat(PATCH, axis=3)[..., None] > 0.5
    predicted = images.copy()
    predicted[0, 0, 0] = np.nan  # a diverged model must still give a figure
    larger = images.repeat(2, axis=2).repeat(2, axis=3)
    pictures = Pictures(
        images,
        np.broadcast_to(hidden, images.shape),
        (predicted, larger),
        ("prediction", "larger"),
    )
    gsd = np.full((SAMPLES, num_views, 2), 0.3)
    figures.reconstructions(path, pictures, gsd, bands=BANDS)
    height, width, _ = read_png(path).shape
    assert 400 < height < 800
    assert 800 * num_views < width < 1300 * num_views


@pytest.mark.parametrize("num_views", [1, 2])
def test_crops(tmp_path, rng, num_views):
    pixels, _, _ = make_views(rng, num_views)
    sources = [
        (np.full((64, 64, 3), 100, np.uint8), 0.3, "square"),
        (np.full((60, 90, 3), 100, np.uint8), 1250.0, "wide, kilometres a pixel"),
    ]
    boxes = np.array([[0, 0, 48, 64], [8, 8, 40, 32]], np.float32)
    boxes = np.broadcast_to(boxes[:num_views], (SAMPLES, num_views, 4))
    gsd = np.full((SAMPLES, num_views, 2), (0.45, 0.6), np.float32)
    path = tmp_path / "figures" / "crops.png"
    figures.crops(path, sources, pixels, boxes, gsd)
    picture = read_png(path)
    assert 900 < picture.shape[0] < 1500
    assert 400 * (1 + num_views) < picture.shape[1] < 600 * (1 + num_views)
    for view, colour in enumerate(figures.VIEW_COLOURS[:2]):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert ((picture == rgb).all(-1).sum() > 2000) == (view < num_views)


def training_rows(steps):
    return [
        {
            "step": step,
            "loss": 3.0 - step / 1000,
            "loss/reconstruction": 1.0,
            "loss/reconstruction_view1": 0.9,
            "loss/reconstruction_view2": 1.1,
            "loss/contrastive": 2.0,
            "learning_rate": 1e-3,
        }
        for step in steps
    ]


KNN = {
    "knn/accuracy_mean": 0.7,
    "knn/accuracy_cls": 0.6,
    "knn/random_encoder_mean": 0.4,
    "knn/random_encoder_cls": 0.3,
    "knn/image_statistics": 0.5,
}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "loss": float("nan")}],
        [{"step": 7, **KNN}],
        [{"step": 7, "knn/image_statistics": 0.5}],
        training_rows([0]),
        [*training_rows(range(0, 500, 10)), {"step": 490, **KNN}],
    ],
    ids=["none", "all_nan", "knn_alone", "one_control", "one", "many"],
)
def test_loss_curves_of_any_rows(tmp_path, rows):
    path = tmp_path / "figures" / "losses.png"
    figures.loss_curves(path, rows)
    height, width, _ = read_png(path).shape
    assert 600 < height < 1600
    assert 1000 < width < 2200


def test_loss_curves_leave_a_gap(tmp_path, drawn_lines):
    rows = training_rows(range(300))
    rows[100]["loss"] = None
    rows[200]["loss"] = float("nan")
    rows[250]["loss"] = float("inf")
    figures.loss_curves(tmp_path / "losses.png", rows)
    points, line, marks = (values for values, _ in drawn_lines[:3])
    assert np.flatnonzero(np.isnan(points)).tolist() == [100, 200, 250]
    assert np.flatnonzero(np.isnan(line)).tolist() == [100, 200, 250]
    assert len(marks) == 3
    # A mean over seven values, which neither the gap nor the ends bend.
    np.testing.assert_allclose(line[50], points[47:54].mean())
    np.testing.assert_allclose(line[99], np.nanmean(points[96:103]))
    np.testing.assert_allclose(line[0], points[:4].mean())


def test_loss_curves_show_accuracy_in_percent(tmp_path, drawn_lines):
    rows = [{"step": 10, **KNN, "knn/accuracy_mean": 0.65}, {"step": 5, **KNN}]
    figures.loss_curves(tmp_path / "losses.png", rows)
    labelled = {label: values for values, label in drawn_lines}
    # In order of step, not of rows.
    np.testing.assert_allclose(labelled["encoder, patch mean: 65.0%"], [70, 65])


def test_accuracies_have_intervals_if_the_number_of_images_is_known(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "vlines",
        lambda self, *args, **_: drawn.append(np.array(args)),
    )
    rows = [{"step": 5, **KNN}, {"step": 10, **KNN, "knn/accuracy_mean": 0.7001}]
    figures.loss_curves(tmp_path / "losses.png", rows)
    assert drawn == []
    figures.loss_curves(tmp_path / "losses.png", rows, knn_images=100)
    steps, low, high = drawn[0]
    assert steps.tolist() == [5, 10]
    assert 58 < low[0] < 64
    assert 76 < high[0] < 82
    # 70.01 % is no number of 100 images: some could not be read.
    assert np.isnan([low[1], high[1]]).all()


def test_a_long_name_keeps_its_end():
    assert end_of("a" * 20, 20) == "a" * 20
    assert end_of("b" * 20 + "/tile_7.png", 14) == ".../tile_7.png"


def test_equal_accuracies_are_both_seen(tmp_path):
    """Equal curves of two features: the wider line shows on both sides."""
    colour = figures.VIEW_COLOURS[0]
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    shown = []
    for other in (0.7, 0.6):
        rows = [{"step": step, **KNN, "knn/accuracy_cls": other} for step in (0, 500)]
        path = tmp_path / str(other) / "losses.png"
        figures.loss_curves(path, rows)
        shown.append((np.abs(read_png(path) - np.array(rgb)).max(-1) < 12).sum())
    equal, apart = shown
    assert equal > 0.6 * apart


@pytest.mark.parametrize(
    ("num_views", "spread", "as_line"), [(1, 0, True), (2, 1e-6, True), (2, 0.5, False)]
)
def test_gsd_histogram(tmp_path, rng, monkeypatch, num_views, spread, as_line):
    """Sources with one GSD (up to rounding) are a line, others a histogram."""
    lines, axvline = [], matplotlib.axes.Axes.axvline
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "axvline",
        lambda self, x, **options: (lines.append(x), axvline(self, x, **options))[1],
    )
    gsd = rng.uniform(0.2, 0.6, (50, num_views, 2))
    source_gsd = 0.3 * rng.uniform(1 - spread, 1 + spread, 50)
    path = tmp_path / "figures" / "gsd.png"
    figures.gsd_histogram(path, gsd, source_gsd=source_gsd)
    height, width, _ = read_png(path).shape
    assert 500 < height < 700
    assert 1100 < width < 1300
    assert lines == (pytest.approx([0.3], rel=1e-5) if as_line else [])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_gsd_histogram_refuses_what_is_no_gsd(tmp_path, bad):
    gsd = np.full((4, 1, 2), 0.3)
    with pytest.raises(ValueError, match="positive number of metres"):
        figures.gsd_histogram(tmp_path / "g.png", gsd, source_gsd=np.full(4, bad))
    with pytest.raises(ValueError, match="positive number of metres"):
        figures.gsd_histogram(tmp_path / "g.png", gsd * bad, source_gsd=gsd[:, 0, 0])


def test_gsds_of_a_run_are_drawn_once_there_are_enough(tmp_path, rng):
    run = types.SimpleNamespace(
        workdir=tmp_path,
        config=types.SimpleNamespace(
            batch_size=GSD_SAMPLES // 2, views=types.SimpleNamespace(size=SIZE)
        ),
        sampler=types.SimpleNamespace(size=SIZE),
        num_steps=3,
        gsd_seen=lambda gsd: gsd,
    )
    batch = {
        "gsd": rng.uniform(1, 2, (GSD_SAMPLES // 2, 2, 2)),
        "box": np.tile([0.0, 0.0, 64.0, 64.0], (GSD_SAMPLES // 2, 2, 1)),
    }
    path = tmp_path / "figures" / "gsd.png"

    def call(hook, step):
        assert hook.due(step)
        hook(types.SimpleNamespace(step=step, batch=batch))

    enough, last = GsdHistogram(run), GsdHistogram(run)
    call(enough, 1)
    assert not path.exists()
    call(enough, 2)
    assert read_png(path).size
    path.unlink()
    call(last, 3)  # the last step
    assert read_png(path).size
    for again in (enough, last, GsdHistogram(run)):  # the same run, and a new start
        assert not again.due(3)


def test_a_picture_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    path = tmp_path / "losses.png"
    figures.loss_curves(path, training_rows([0]))
    first = path.read_bytes()
    figures.loss_curves(path, training_rows(range(50)))
    second = path.read_bytes()
    assert second != first
    assert list(tmp_path.iterdir()) == [path]

    def killed(self, target, **options):
        target.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        figures.loss_curves(path, training_rows([0]))
    assert path.read_bytes() == second
    assert list(tmp_path.iterdir()) == [path]
