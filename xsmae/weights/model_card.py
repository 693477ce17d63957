"""Writes the model card of an encoder: a README.md as Hugging Face reads it.

All its facts come from `encoder.json`. The second line has a digest of the rest. The
file is replaced only while that digest fits, so text that a person wrote is never lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xsmae.bands import known_or_empty
from xsmae.errors import printable
from xsmae.process.files import atomic_write

NAME = "README.md"
NOT_STATED = "not stated"
TITLES = {
    "mae": "MAE",
    "sat_mae": "SatMAE",
    "scale_distill": "Cross-scale distillation",
    "scale_mae": "Scale-MAE",
    "sigreg": "SIGReg with pixels",
    "simclr": "SimCLR",
    "cross_scale_mae": "Cross-Scale MAE",
}
# Format of the weights -> Hugging Face's name of the library that loads them.
LIBRARIES = {"xsmae": "xsmae", "timm": "timm", "huggingface": "transformers"}
# Identifiers that Hugging Face accepts as `license`; other texts are in the body only.
LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0",
    "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "odbl", "gpl-3.0",
)  # fmt: skip
# An id on Hugging Face. Without an owner it may name another data set there.
DATASET = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_CLASSES = 20  # class names that the card lists
# Name of an accuracy in `run.knn` -> encoder and feature in the table.
SUBJECTS = {
    "accuracy_mean": ("this encoder", "mean patch"),
    "accuracy_cls": ("this encoder", "class token"),
    "random_encoder_mean": ("control: the same encoder, untrained", "mean patch"),
    "random_encoder_cls": ("control: the same encoder, untrained", "class token"),
    "image_statistics": ("control: image statistics", "-"),
}
# Fields of `run` in encoder.json -> their names in the card.
RUN_FIELDS = {
    "data_name": "data set",
    "images": "images",
    "fingerprint": "fingerprint of the images",
    "data": "source",
    "import": "imported from",
    "sha256": "SHA-256 of the imported file",
    "steps": "steps",
    "batch_size": "batch size",
    "seed": "seed",
}
_MARKER = re.compile(rb"---\n# Written by xsmae, digest ([0-9a-f]{16})[^\n]*\n")


def write_card(
    folder: Path,
    info: Mapping[str, Any],
    *,
    format: str = "xsmae",
    notes: Iterable[str] = (),
) -> bool:
    """Write `folder/README.md`; False if a person wrote or edited it, and it stays.

    info: the content of `encoder.json`. format, notes: see `card`.
    """
    path = folder / NAME
    if path.exists() and not _is_unedited(path.read_bytes()):
        return False
    with atomic_write(path) as temporary:
        temporary.write_bytes(card(info, format=format, notes=notes).encode())
    return True


def card(info: Mapping[str, Any], *, format: str, notes: Iterable[str] = ()) -> str:
    """The text of the card.

    format: one of LIBRARIES, the format of the weights next to the card. notes: what a
    user of an exported encoder must know.
    """
    parts = [
        *_front_matter(info, LIBRARIES[format]),
        "---",
        "",
        f"# {_title(info)} encoder for remote-sensing images",
        "",
        _summary(info),
        "",
        *_model(info),
        *_training(info),
        *_results(info),
        *_use(info, format, notes),
    ]
    rest = printable("\n".join(parts))
    line = f"# Written by xsmae, digest {_digest(rest.encode())}. Edit this file freely"
    return f"---\n{line}: xsmae replaces it only while it is unedited.\n{rest}"


def _is_unedited(content: bytes) -> bool:
    marker = _MARKER.match(content)
    return bool(marker) and marker[1].decode() == _digest(content[marker.end() :])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _front_matter(info: Mapping[str, Any], library: str) -> list[str]:
    """Hugging Face's fields as YAML, without the fences."""
    run = info.get("run") or {}
    method, data = run.get("method", ""), run.get("data_name", "")
    tags = ["remote-sensing", "earth-observation", "self-supervised", "vit"]
    tags += [method.replace("_", "-")] if method in TITLES else []
    lines = [f"library_name: {library}"]
    if info.get("licence") in LICENCES:
        lines.append(f"license: {info['licence']}")
    lines += ["pipeline_tag: image-feature-extraction", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    if DATASET.fullmatch(data):
        lines += ["datasets:", f'- "{data}"']
    if run.get("knn"):
        lines += ["metrics:", "- accuracy"]
    return lines


def _title(info: Mapping[str, Any]) -> str:
    return TITLES.get((info.get("run") or {}).get("method"), "ViT")


def _summary(info: Mapping[str, Any]) -> str:
    width = info["architecture"]["embed_dim"]
    trained = (info.get("run") or {}).get("method") in TITLES
    how = f" {_title(info)} pretrained it without labels." if trained else ""
    return f"A vision transformer that turns an image into {width} features.{how}"


def _model(info: Mapping[str, Any]) -> list[str]:
    shape, seen = info["architecture"], info.get("gsd_range")
    position = "fixed"
    if shape["position"] == "gsd":
        position = f"scaled by the GSD, reference {shape['reference_gsd']} m per pixel"
    groups = shape.get("channel_groups")
    waves = known_or_empty(info.get("wavelengths", ()))
    waves = _joined("unknown" if w is None else w for w in waves)
    rows = [
        ("width", shape["embed_dim"]),
        ("depth", shape["depth"]),
        ("attention heads", shape["num_heads"]),
        ("patch size", f"{shape['patch_size']} px"),
        ("position encoding", position),
        *([("groups of bands", groups)] if groups else []),
        ("pooling", info["pooling"]),
        ("bands, in order", _joined(info["bands"])),
        *([("wavelengths in nm", waves)] if waves else []),
        ("units", info.get("units", NOT_STATED)),
        ("mean per band", _joined(info["mean"])),
        ("standard deviation per band", _joined(info["std"])),
        ("image size in training", f"{info['image_size']} px"),
        (
            "GSD in training",
            f"{seen[0]:.4g} to {seen[1]:.4g} m per pixel" if seen else "not recorded",
        ),
        ("licence of the weights", info.get("licence") or NOT_STATED),
    ]
    return ["## Model", "", *_table(["", ""], rows), ""]


def _training(info: Mapping[str, Any]) -> list[str]:
    run = info.get("run") or {}
    rows = [(title, run[name]) for name, title in RUN_FIELDS.items() if name in run]
    rows.append(("licence of the data", info.get("data_licence") or NOT_STATED))
    rows.insert(0, ("method", TITLES.get(run.get("method"), run.get("method", "-"))))
    lines = ["## Training", "", *_table(["", ""], rows), ""]
    if run.get("recipe"):
        lines += ["Recipe:", "", "```", *_recipe(run["recipe"]), "```", ""]
    return lines


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    # A backtick could end the block of code.
    return [
        f"{name} = {json.dumps(value)}".replace("`", "\\u0060")
        for name, value in recipe.items()
    ]


def _results(info: Mapping[str, Any]) -> list[str]:
    """The kNN accuracies that the run measured, if it did."""
    knn = (info.get("run") or {}).get("knn")
    if not knn:
        return []
    rows = [
        (*SUBJECTS[name], _percent(*values))
        for name, values in knn["accuracy"].items()
        if name in SUBJECTS
    ]
    classes = [_literal(name) for name in knn["classes"][:MAX_CLASSES]]
    more = len(knn["classes"]) - len(classes)
    classes += [f"and {more} more"] if more else []
    measured = any(len(values) == 3 for values in knn["accuracy"].values())
    brackets = f"Brackets: {knn['interval']}. " if measured else ""
    return [
        "## Results",
        "",
        f"kNN accuracy after step {knn['step']}: k = {knn['k']}, cosine similarity, "
        f"votes weighted by exp(similarity / {knn['temperature']}), "
        f"{knn['train_images']} labelled training images, {knn['test_images']} test "
        f"images, resized to {knn['size']} px.",
        "",
        *_table(["encoder", "feature", "accuracy in %"], rows),
        "",
        f"{brackets}An encoder has learned something only if it beats both controls.",
        "",
        f"{len(knn['classes'])} classes: {', '.join(classes)}.",
        "",
    ]


def _percent(value: float, low: float | None = None, high: float | None = None) -> str:
    if low is None or high is None:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _use(info: Mapping[str, Any], format: str, notes: Iterable[str]) -> list[str]:
    shape, size, bands = info["architecture"], info["image_size"], len(info["bands"])
    if format == "timm":
        code = [
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
            "features = model(images)  # [batch, bands, height, width], normalised",
        ]
    elif format == "huggingface":
        pooled = "[:, 0]" if info["pooling"] == "cls" else "[:, 1:].mean(1)"
        code = [
            "from transformers import ViTModel",
            "",
            'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)',
            "tokens = model(images).last_hidden_state  # images normalised",
            f"features = tokens{pooled}",
        ]
    else:
        seen = info.get("gsd_range")
        # The middle of what training saw, or else the reference.
        usual = math.sqrt(math.prod(seen)) if seen else shape["reference_gsd"]
        gsd = f", gsd={usual:.3g}" if shape["position"] == "gsd" else ""
        comment = "metres per pixel; " if gsd else ""
        dtype = info.get("dtype", "uint8")  # float32 is in the units above
        code = [
            "import numpy as np, xsmae",
            "",
            'encoder = xsmae.load_encoder("FOLDER")',
            f"images = np.zeros((1, {size}, {size}, {bands}), np.{dtype})",
            f"features = encoder(images{gsd})  # {comment}[1, {shape['embed_dim']}]",
        ]
    lines = [
        "## Use",
        "",
        "FOLDER is the folder of this file.",
        "",
        "```python",
        *code,
        "```",
        "",
    ]
    lines += [f"- {_literal(note)}" for note in notes]
    if info.get("gsd_range"):
        low, high = info["gsd_range"]
        lines.append(
            f"- Features may be poor outside {low:.4g} to {high:.4g} m per pixel."
        )
    return [*lines, ""]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_literal(cell) for cell in row)} |" for row in cells]


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _literal(value: Any) -> str:
    """Escape a text for Markdown, also in a table: one line, no markup."""
    return re.sub(r"([\\`*_\[\]<>|$#~&])", r"\\\1", " ".join(str(value).split()))
