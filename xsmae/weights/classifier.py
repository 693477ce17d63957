"""A trained classifier of whole images, with the encoder that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.config import DTYPES
from xsmae.errors import UserError
from xsmae.models.linear import LinearProbe, LogisticRegression, PooledLinear
from xsmae.models.pooling import POOLINGS
from xsmae.weights import head_files
from xsmae.weights.encoder import Encoder
from xsmae.weights.inputs import check_gsd

if TYPE_CHECKING:
    from jaxtyping import Float

    from xsmae.weights.encoder import Gsd

TASK = "classify"
# Logistic regression, the published probe, and fine-tuning.
KINDS = ("logistic", "batch_norm", "finetuned")
REQUIRED = (
    "kind", "classes", "feature", "size", "scale", "gsd_policy", "gsd_factor",
    "architecture", "encoder", "weights", "training",
)  # fmt: skip
LOGISTIC = ("mean", "std", "kernel", "bias")

# From features [n, width] to scores [n, classes].
Scores = Callable[[np.ndarray], np.ndarray]


class Classifier:
    """A trained classifier: `classifier.predict(images, gsd=...)` -> probabilities.

    info: the content of its `head.json`. classes: names. encoder: the one that it
    reads. feature: what it reads, `cls` or `mean`. size: the side in pixels of the
    images that it was trained on.
    """

    def __init__(self, scores: Scores, encoder: Encoder, info: Mapping[str, Any]):
        self.info, self.encoder, self._of_features = dict(info), encoder, scores
        self.classes = tuple(entry["name"] for entry in info["classes"])
        self.feature, self.size = info["feature"], info["size"]

    def __repr__(self) -> str:
        return f"Classifier({self.info['kind']}, classes {', '.join(self.classes)})"

    def predict(
        self, images: np.ndarray, gsd: Gsd = None
    ) -> Float[np.ndarray, "batch classes"]:
        """The probability of each class, float32; a row's sum is 1.

        images: [batch, height, width, bands], as `Encoder` takes them, at their best of
        `size` pixels. gsd: metres per pixel of the images as they are, one number,
        [batch], or [batch, 2] as (y, x); needed if the encoder reads it. With the GSD
        policy `fixed` the encoder gets it times the `gsd_factor` of `info`, as in the
        training.
        """
        return probabilities(self.scores(images, gsd))

    def scores(
        self, images: np.ndarray, gsd: Gsd = None
    ) -> Float[np.ndarray, "batch classes"]:
        """The scores before the softmax; the predicted class has the highest."""
        images = np.asarray(images)
        if gsd is not None:
            gsd = check_gsd(gsd, len(images)) * np.float32(self.info["gsd_factor"])
        features = self.encoder(images, gsd=gsd, pooling=self.feature)
        return np.asarray(self._of_features(features), np.float32)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits; classifiers with equal digests give equal scores."""
        names = ("kind", "classes", "feature", "size", "gsd_factor", "architecture")
        return head_files.digest_of(self.info, names)


def probabilities(
    scores: Float[np.ndarray, "batch classes"],
) -> Float[np.ndarray, "batch classes"]:
    """The softmax of scores, float32."""
    scores = np.asarray(scores, np.float64)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.float32(shares / shares.sum(axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """A classifier after its training, and what `save_classifier` writes of it.

    kind: one of `KINDS`. tensors: the weights by name. architecture: what `_scores`
    needs besides them. encoder: the one that it reads. details: numbers of the
    training that no recipe has, such as the chosen penalty.
    """

    kind: str
    tensors: Mapping[str, np.ndarray]
    architecture: Mapping[str, Any]
    encoder: head_files.Trained
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def logistic(
        cls, model: LogisticRegression, encoder: head_files.Trained
    ) -> TrainedClassifier:
        """Logistic regression on a frozen encoder."""
        tensors = {
            n: np.ascontiguousarray(getattr(model, n), np.float32) for n in LOGISTIC
        }
        details = {"penalty": model.penalty}
        return cls("logistic", tensors, {"dtype": encoder.dtype}, encoder, details)


def save_classifier(
    folder: str | Path,
    trained: TrainedClassifier,
    *,
    classes: Sequence[str],
    feature: str,
    size: int,
    scale: float,
    gsd_policy: str,
    gsd_factor: float,
    training: Mapping[str, Any],
    beside: Path | None = None,
) -> None:
    """Write a trained classifier and its encoder.

    feature: what it reads of the encoder. size, scale: of its images, in pixels and in
    percent. gsd_policy, gsd_factor: what the encoder gets as GSD, see `scales.Scale`.
    training: what else a reader should know of it, such as the protocol and the
    digests of the encoder and the data; JSON. beside: see `write_head`.
    """
    fields = {
        "task": TASK,
        "kind": trained.kind,
        "classes": [{"name": name} for name in classes],
        "feature": feature,
        "size": size,
        "scale": scale,
        "gsd_policy": gsd_policy,
        "gsd_factor": gsd_factor,
        "architecture": dict(trained.architecture),
        "training": {**training, **trained.details},
    }
    encoder = Encoder(trained.encoder.network, trained.encoder.info)
    head_files.write_head(Path(folder), encoder, trained.tensors, fields, beside=beside)


def read_classifier(folder: Path, info: Mapping[str, Any]) -> Classifier:
    """The classifier of a folder whose `head.json` is `info`."""
    head_files.check_fields(folder / "head.json", info, REQUIRED, _checks)
    encoder, tensors = head_files.read_head(folder, info)
    scores = _scores(folder, info, tensors, encoder.network.embed_dim)
    return Classifier(scores, head_files.in_dtype(encoder, info), info)


def _scores(
    folder: Path, info: Mapping[str, Any], tensors: Mapping[str, np.ndarray], width: int
) -> Scores:
    """The function from features to scores; UserError if the tensors do not fit."""
    number, options = len(info["classes"]), dict(info["architecture"])
    if options.pop("dtype", None) not in DTYPES:
        raise UserError(
            f"{folder}/head.json is inconsistent: its dtype is none of "
            f"{', '.join(DTYPES)}"
        )
    if info["kind"] == "logistic":
        shapes = [(width,), (width,), (width, number), (number,)]
        expected = dict(zip(LOGISTIC, shapes, strict=True))
        head_files.check_shapes(tensors, expected, folder)
        model = LogisticRegression(**tensors, penalty=np.nan)
        return lambda features: model.scores(np.asarray(features))
    model = head_files.build(
        folder, lambda: _new(info["kind"], width, number, info["feature"], options)
    )
    head_files.fill(model, tensors, folder)
    graphdef, state = nnx.split(model)
    training = {"training": False} if info["kind"] == "batch_norm" else {}

    @jax.jit
    def scores(state, features):
        return nnx.merge(graphdef, state).scores(jnp.asarray(features), **training)

    return lambda features: scores(state, features)


def _new(
    kind: str, width: int, number: int, feature: str, options: Mapping[str, Any]
) -> nnx.Module:
    if kind == "batch_norm":
        numbers = {"momentum": 0.0, "head_std": 0.0, **options}
        return LinearProbe(width, number, **numbers, rngs=nnx.Rngs(0))
    numbers = {"head_std": 0.0, **options}
    return PooledLinear(width, number, feature=feature, **numbers, rngs=nnx.Rngs(0))


def _checks(info: Mapping[str, Any]) -> dict[str, bool]:
    """For each field of a `head.json`, whether a classifier can have its value."""
    return {
        "kind": info["kind"] in KINDS,
        "classes": head_files.are_named(info["classes"]),
        "feature": info["feature"] in POOLINGS,
        "size": head_files.is_whole(info["size"], 1),
        "gsd_factor": type(info["gsd_factor"]) in (int, float)
        and 0 < info["gsd_factor"] < np.inf,
        "architecture": isinstance(info["architecture"], dict),
    }
