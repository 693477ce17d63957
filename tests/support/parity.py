"""Compares with official implementations: `python -m tests.support.parity DIR`.

Each case in DIR is NAME.pth (a checkpoint in the official layout), NAME.json (sizes and
options) and NAME.npz (inputs, random numbers, outputs, losses, gradients, statistics).
A case goes through the importer, the model's forward with the given noise, the losses
and `jax.grad`. The error of an array is the largest difference divided by the largest
expected number.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.cli.convert import import_checkpoint
from xsmae.methods import METHODS
from xsmae.methods.scale_mae import frequencies_of
from xsmae.models.mae import Views
from xsmae.models.scale_mae import combine
from xsmae.models.vit import patchify
from xsmae.weights.layouts import leaves, weights_of
from xsmae.weights.official import OPTIONS

OUTPUTS, LOSSES, GRADIENTS = 1e-4, 1e-5, 1e-3
# Option names of a case's JSON -> names of the importer.
RENAMED = {"encoder_num_heads": "num_heads"}


@dataclasses.dataclass(frozen=True)
class Row:
    """An array of a case, its relative error, and the limit."""

    array: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def relative_error(found, expected) -> float:
    """The largest difference divided by the largest expected number."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return float("inf")
    scale = max(np.abs(expected).max(), 1e-12)
    return float(np.abs(found - expected).max() / scale)


def check(case: Path) -> list[Row]:
    """Checks every array of the case with the JSON file `case`."""
    sizes = json.loads(case.read_text())
    arrays = dict(np.load(case.with_suffix(".npz")))
    options = {RENAMED.get(k, k): v for k, v in sizes.items()}
    options = {k: v for k, v in options.items() if k in OPTIONS}
    imported = import_checkpoint(case.with_suffix(".pth"), **options)
    method = METHODS[imported.config.method]
    model, loss = imported.config.model.to_dict(), imported.config.loss.to_dict()
    endings = ["", "_crop"][: method.num_views]
    views, noise = _inputs(arrays, endings, model["reference_gsd"])
    graphdef, params, stats = nnx.split(imported.network, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, stats):
        def total(params):
            # Variables may be written only in the trace that created them.
            fresh = jax.tree.map(lambda x: x, stats)
            network = nnx.merge(graphdef, params, fresh)
            output = network(views, noise)
            terms, extras = method.losses(output, views, model=model, loss=loss)
            weighted = (loss[name]["weight"] * term for name, term in terms.items())
            after = nnx.state(network, nnx.BatchStat)
            return sum(weighted), (output, terms | extras, after)

        return jax.value_and_grad(total, has_aux=True)(params)

    (total, (output, terms, after)), grads = run(params, stats)
    found = {"loss_total": total}
    for view, ending in enumerate(endings):
        found |= {
            f"{name}{ending}": np.asarray(value)[:, view]
            for name, value in _outputs(output, model, views, loss).items()
        }
    for ours, theirs in (
        ("reconstruction_view1", "reconstruction"),
        ("reconstruction_view2", "reconstruction_crop"),
        ("contrastive", "contrastive"),
        ("cross_prediction", "cross_prediction"),
    ):
        if ours in terms:
            found[f"loss_{theirs}"] = terms[ours]
    naming = _naming(sizes)
    gradients, statistics = leaves(grads), leaves(after)
    for weight in weights_of(model, method=imported.config.method, naming=naming):
        if weight.path in gradients:
            gradient = weight.theirs(np.asarray(gradients[weight.path]))
            found[f"grad/{weight.name}"] = gradient
            found[f"grad_norm/{weight.name}"] = np.linalg.norm(gradient)
        else:
            found[f"after/{weight.name}"] = statistics[weight.path]
    return [_row(name, arrays[name], found) for name in arrays if _compared(name)]


def _inputs(arrays, endings, reference_gsd) -> tuple[Views, jax.Array]:
    images = np.stack([arrays[f"images{e}"] for e in endings], axis=1)
    noise = np.stack([arrays[f"noise{e}"] for e in endings], axis=1)
    batch, num_views = images.shape[:2]
    gsd = arrays.get("relative_resolution", np.ones(batch)) * reference_gsd
    targets = arrays.get("targets")
    views = Views(
        images=jnp.asarray(images),
        gsd=jnp.tile(jnp.asarray(gsd, jnp.float32)[:, None, None], (1, num_views, 2)),
        box=jnp.tile(jnp.array([0.0, 0, 1, 1]), (batch, num_views, 1)),
        target=None if targets is None else jnp.asarray(targets)[:, None],
    )
    return views, jnp.asarray(noise)


def _naming(sizes) -> str:
    if "dim_model" not in sizes:
        return "timm"
    kind = "xformers" if sizes.get("use_xformers") else "timm"
    return f"cross_scale_{kind}"


def _outputs(output, model, views, loss) -> dict[str, np.ndarray]:
    """The outputs by the cases' names, each with its views on axis 1."""
    names = ("mask", "encoder_tokens", "decoder_tokens")
    found = {name: getattr(output, name) for name in names}
    patch = model["patch_size"]
    if model.get("target_scale"):
        bands = {
            "low": output.pred.low,
            "high": output.pred.high,
            "all": combine(output.pred, frequencies_of(views, loss).cutoff),
        }
        for name, images in bands.items():
            found[f"pred/{name}"] = patchify(images[:, 0], patch)[:, None]
    elif model.get("channel_groups"):
        # The official prediction is [batch, bands, patches, pixels].
        pred = np.asarray(output.pred)
        pred = pred.reshape(*pred.shape[:3], patch * patch, views.images.shape[-1])
        found["pred"] = np.moveaxis(pred, -1, 2)
    else:
        found["pred"] = output.pred
    return found


def _compared(name: str) -> bool:
    inputs = ("images", "noise", "targets", "relative_resolution")
    return not name.startswith(inputs)


def _row(name: str, expected, found) -> Row:
    if name not in found:
        return Row(name, float("nan"), 0.0)
    if name.startswith("grad_norm/"):
        # A bias before a softmax or a norm has no gradient except rounding.
        difference = abs(float(found[name]) - float(expected))
        scale = max(float(expected), 1e-3)
        return Row(name, difference / scale, GRADIENTS)
    limit = OUTPUTS
    if name.startswith("loss"):
        limit = LOSSES
    elif name.startswith("grad/"):
        limit = GRADIENTS
    return Row(name, relative_error(found[name], expected), limit)


def main(argv: list[str]) -> int:
    """Checks every case of the folder; returns the exit status."""
    if len(argv) != 1:
        print("usage: python -m tests.support.parity DIR", file=sys.stderr)
        return 2
    cases = sorted(Path(argv[0]).glob("*.json"))
    if not cases:
        print(f"{argv[0]} contains no case (NAME.json, NAME.npz, NAME.pth)")
        return 2
    failed = 0
    for case in cases:
        print(case.stem)
        try:
            rows = check(case)
        except Exception as error:  # count the case as failed and continue
            print(f"  cannot be run: {type(error).__name__}: {error}")
            failed += 1
            continue
        for row in rows:
            mark = "" if row.passed else f"  FAILED, at most {row.limit:g}"
            print(f"  {row.error:9.1e}  {row.array}{mark}")
        failed += not all(row.passed for row in rows)
    print(f"{len(cases) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
