"""Describes the run that made an encoder, for `encoder.json` and its model card."""

from __future__ import annotations

from typing import Any

from xsmae.config import flatten
from xsmae.evaluation.intervals import LEVEL, accuracy_interval
from xsmae.evaluation.parts import name_of
from xsmae.evaluation.tasks.knn import KnnMonitor
from xsmae.process.files import read_jsonl
from xsmae.run.run import Run

# Fields of the config that belong to the recipe; loss.* and views.* do too.
RECIPE = (
    "model.mask_ratio",
    "model.decoder_embed_dim",
    "model.decoder_depth",
    "model.dtype",
    "optim.weight_decay",
    "optim.b1",
    "optim.b2",
    "optim.clip_norm",
)


def describe_run(
    run: Run, during: KnnMonitor | None, full: KnnMonitor | None
) -> dict[str, Any]:
    """The field `run` of `encoder.json` at the end of a run.

    during, full: from `create_monitors`. Their last accuracies are read from
    `metrics.jsonl`.
    """
    config, schedule = run.config, run.trainer.schedule
    flat = flatten(config.to_dict())
    knn = _knn(run, during, full)
    return {
        "method": config.method,
        "seed": config.seed,
        "steps": run.num_steps,
        "batch_size": config.batch_size,
        "data": repr(run.source),
        "data_name": name_of(config.data),
        "images": len(run.source),
        "fingerprint": run.source.fingerprint,
        "recipe": {
            "epochs": round(run.num_steps / schedule.steps_per_epoch, 2),
            "learning_rate": schedule.learning_rate,
            "warmup_steps": schedule.warmup_steps,
            **{name: flat[name] for name in RECIPE if name in flat},
            **{n: v for n, v in flat.items() if n.startswith(("loss.", "views."))},
        },
        **({"knn": knn} if knn else {}),
    }


def _knn(
    run: Run, during: KnnMonitor | None, full: KnnMonitor | None
) -> dict[str, Any] | None:
    """The last kNN accuracies: of all labelled images, or else of the monitor."""
    rows = read_jsonl(run.workdir / "metrics.jsonl")
    for prefix, monitor in (("knn_full/", full), ("knn/", during)):
        found, step = {}, 0
        for row in rows:
            found |= {k: v for k, v in row.items() if k.startswith(prefix)}
            step = row["step"] if f"{prefix}accuracy_cls" in row else step
        if monitor is None or f"{prefix}accuracy_cls" not in found:
            continue
        tested = len(monitor.test_indices)
        return {
            "k": run.config.knn.k,
            "temperature": run.config.knn.temperature,
            "size": run.config.views.size,
            "step": step,
            "train_images": len(monitor.train_indices),
            "test_images": tested,
            "classes": list(monitor.test.class_names),
            "interval": f"{100 * LEVEL:g} % percentile bootstrap over the test images",
            "accuracy": {
                name.removeprefix(prefix): _with_interval(value, tested, run)
                for name, value in found.items()
                if value is not None
            },
        }
    return None


def _with_interval(value: float, tested: int, run: Run) -> list[float]:
    """[accuracy, low, high], or [accuracy] if some test images could not be used."""
    return [value, *(accuracy_interval(value, tested, seed=run.config.seed) or ())]
