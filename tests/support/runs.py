"""Small pretraining runs: flags, calls, comparisons."""

from pathlib import Path

from xsmae.cli import pretrain as main
from xsmae.methods import METHODS
from xsmae.process.files import read_jsonl

ROOT = Path(__file__).parents[2]

TIMES = ("images_per_second", "waiting_for_data")

SMALL_MODEL = [
    "--config.views.size=16",
    "--config.model.patch_size=8",
    "--config.model.mask_ratio=0.75",
    "--config.model.embed_dim=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.model.decoder_embed_dim=8",
    "--config.model.decoder_depth=1",
    "--config.model.decoder_num_heads=2",
    "--config.model.dtype=float32",
    "--config.batch_size=8",
    "--config.log_every=2",
    "--config.checkpoint.every=3",
    "--config.figures.samples=2",
    "--config.knn.batch_size=16",
]

SMALL_RUN = [
    *SMALL_MODEL,
    "--config.data.num_images=30",
    "--config.data.size=32",
    "--config.knn.test.num_images=20",
    "--config.num_steps=8",
    "--config.optim.warmup_steps=2",
    "--config.knn.every=4",
    "--config.figures.every=0",
]


def for_method(method, flags):
    """The flags of the fields that a method has."""
    unused = METHODS[method].unused if method in METHODS else ()
    return [
        flag
        for flag in flags
        if flag.removeprefix("--config.").split("=")[0] not in unused
    ]


def call(*arguments):
    return main.main(["xsmae", *arguments])


def refused(capsys, *arguments):
    """The one-line error of a wrong call."""
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("xsmae: ")
    return lines[0]


def comparable(workdir):
    """The lines of `metrics.jsonl` without times."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]
