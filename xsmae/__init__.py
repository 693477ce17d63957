"""Cross-scale pretraining of remote-sensing image encoders in JAX/Flax.

    import xsmae

    config = xsmae.load_config("folder", {"data.root": "images", "data.gsd": 0.5})
    workdir = xsmae.pretrain(config, "runs/mine")
    encoder = xsmae.load_encoder(workdir)
    train, test = (xsmae.open_source(config, split=part) for part in ("train", "test"))
    rows = xsmae.evaluate(encoder, train, test, task="knn")

Each name is imported only when it is used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ml_collections

    from xsmae.config import load_config
    from xsmae.data.catalogue import open_source
    from xsmae.data.raster import open_raster
    from xsmae.evaluation.evaluate import Subject, evaluate
    from xsmae.evaluation.parts import Data
    from xsmae.evaluation.rows import Result, read_results
    from xsmae.scenes.api import embed
    from xsmae.scenes.embedding_maps import map_embeddings
    from xsmae.scenes.mapped import map_scene
    from xsmae.scenes.search import search
    from xsmae.weights.encoder import Encoder, load_encoder
    from xsmae.weights.export import export
    from xsmae.weights.head import load_head
    from xsmae.weights.importing import import_weights

__version__ = "0.1.0"

__all__ = [
    "Encoder",
    "embed",
    "evaluate",
    "export",
    "import_weights",
    "load_config",
    "load_encoder",
    "load_head",
    "map_embeddings",
    "map_scene",
    "open_raster",
    "open_source",
    "pretrain",
    "read_results",
    "search",
    "segment",
]

# Name -> the module that defines it.
_HOMES = {
    "Encoder": "xsmae.weights.encoder",
    "embed": "xsmae.scenes.api",
    "evaluate": "xsmae.evaluation.evaluate",
    "export": "xsmae.weights.export",
    "import_weights": "xsmae.weights.importing",
    "load_config": "xsmae.config",
    "load_encoder": "xsmae.weights.encoder",
    "load_head": "xsmae.weights.head",
    "map_embeddings": "xsmae.scenes.embedding_maps",
    "map_scene": "xsmae.scenes.mapped",
    "open_raster": "xsmae.data.raster",
    "open_source": "xsmae.data.catalogue",
    "read_results": "xsmae.evaluation.rows",
    "search": "xsmae.scenes.search",
}


def __getattr__(name: str) -> Any:
    # Lazy imports, so that `import xsmae.models` only needs jax and flax.
    if name not in _HOMES:
        raise AttributeError(f"module 'xsmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def pretrain(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    keep: Iterable[str] = (),
) -> Path:
    """Trains as a config says, and returns the workdir for `load_encoder`.

    Resumes a run that was stopped in the workdir. If `config.init` names weights, the
    network's fields change to match them, except the dotted fields in `keep`. Raises
    UserError for an error that the user can fix. If a signal stops the run, saves the
    state and raises KeyboardInterrupt; the same call then resumes the run.
    """
    from absl import logging

    from xsmae import train
    from xsmae.cli.pretrain import LESS_MEMORY
    from xsmae.errors import memory_shortage
    from xsmae.process.log import LOG, shown
    from xsmae.run import choices
    from xsmae.run.hosts import ends_with_the_others
    from xsmae.weights import warm_start

    workdir, config = Path(workdir), config.copy_and_resolve_references()
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax logs every file and every error
    try:
        with shown(), ends_with_the_others(), memory_shortage(LESS_MEMORY):
            if config.init:
                for change in warm_start.adopt(config, keep, workdir=workdir):
                    LOG.info(f"taken from the weights: {change}")
            for line in choices.fit_warmup(config, keep, workdir=workdir):
                LOG.info(line)
            status = train.train_and_evaluate(config, workdir)
    finally:
        logging.set_verbosity(before)
    if status:
        raise KeyboardInterrupt(f"stopped by signal {status - 128}")
    return workdir


def segment(
    encoder: Subject,
    train: Data,
    test: Data,
    *,
    head: str = "linear",
    freeze: bool = True,
    recipe: Mapping[str, Any] | None = None,
    scales: Sequence[float] = (100.0,),
    gsd: str = "true",
    controls: bool = True,
    results: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    seed: int = 0,
    name: str | None = None,
    data_name: str | None = None,
    missing_bands: str = "refuse",
    config: ml_collections.ConfigDict | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Measure an encoder and its controls by segmentation; returns result rows.

        rows = xsmae.segment("runs/mine", train, test, recipe={"num_steps": 400})

    Args:
      encoder: as in `evaluate`, except `thumbnail`.
      train, test: sources with masks (see `xsmae.open_source`), or their fields.
      head: `linear`, `knn` or `upernet`. freeze: False trains the encoder too, with
        `upernet`.
      recipe: the fields that differ from the head's default, such as
        `{"crop": 256, "num_steps": 2000}`.
      scales: percent of the images' own size.
      controls: also measure the controls: the architecture with random weights and,
        for the linear head, statistics of the neighbourhood of each pixel.
      out: the folder that gets a folder for each row, named in `row.files`: confusion
        matrices, a picture of examples and, for the encoder itself, the trained head.
        None keeps none of them.
      gsd, results, cache, seed, name: as in `evaluate`.
      data_name, missing_bands, config, progress, should_stop: as in `evaluate`.

    Raises:
      UserError: arguments that do not fit, in one line, before anything is trained.
    """
    from xsmae.evaluation.evaluate import cache_folder, print_line
    from xsmae.evaluation.segmentation.evaluate import evaluate_segmentation
    from xsmae.evaluation.segmentation.heads import create_head
    from xsmae.figures.triplets import draw_examples

    chosen = create_head(head, freeze=freeze, recipe=recipe)
    with cache_folder(cache) as folder:
        return evaluate_segmentation(
            encoder,
            train,
            test,
            head=chosen,
            results=None if results is None else Path(results),
            out=None if out is None else Path(out),
            cache=folder,
            scales=scales,
            gsd=gsd,
            controls=controls,
            seed=seed,
            name=name,
            data_name=data_name,
            missing_bands=missing_bands,
            config=config,
            draw=draw_examples,
            should_stop=should_stop,
            say=print_line if progress else lambda line: None,
        )
