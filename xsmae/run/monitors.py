"""The kNN monitors of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import ml_collections

from xsmae.data.catalogue import build_source
from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.evaluation.tasks.knn import KnnMonitor

PARTS = ("train", "test")  # of the kNN monitor


def create_monitors(
    config: ml_collections.ConfigDict,
    source: Source,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[KnnMonitor | None, KnnMonitor | None]:
    """The kNN monitor during the run, and the one over all images at its end.

    None where there are no labels, or where `config.knn` does not want it.
    """
    knn = config.knn
    if len(source.class_names) < 2 or knn.every < 0:
        return None, None
    try:
        train, test = (build_source({**config.data, **knn[n]}) for n in PARTS)
    except UserError as error:
        raise UserError(
            f"the kNN monitor's images (config.knn.train, config.knn.test): {error}; "
            "or switch it off with --config.knn.every=-1"
        ) from None
    devices = jax.device_count()
    create = functools.partial(
        KnnMonitor,
        train,
        test,
        size=config.views.size,
        k=knn.k,
        temperature=knn.temperature,
        batch_size=-(-knn.batch_size // devices) * devices,
        should_stop=should_stop,
    )
    during = create(max_train=knn.max_train, max_test=knn.max_test)
    return during, create(max_train=0, max_test=0) if knn.full_at_end else None
