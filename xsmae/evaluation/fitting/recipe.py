"""Recipes for training classifiers: defaults, ranges and schedules.

A recipe is a ConfigDict. All its fields are part of the result row's protocol. Set a
field with `--recipe.FIELD=VALUE`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections
import optax
from absl import flags

from xsmae.config import DTYPES
from xsmae.data.views import INTERPOLATIONS, ViewSampler
from xsmae.errors import UserError
from xsmae.optim import warmup_cosine
from xsmae.ranges import BELOW_1, LARGE, SMALL, check_numbers, expected_number

COUNT, ABOVE_0, FROM_0 = (2, LARGE), (SMALL, LARGE), (0, LARGE)
SHARE, FRACTION = (0, 1), (0, BELOW_1)
RANGES = {
    "batch_size": COUNT,
    "epochs": ABOVE_0,
    "warmup_epochs": FROM_0,
    "learning_rate": ABOVE_0,
    "learning_rate_batch": ABOVE_0,
    "min_learning_rate": FROM_0,
    "weight_decay": FROM_0,
    "trust_coefficient": ABOVE_0,
    "momentum": FRACTION,
    "b1": FRACTION,
    "b2": FRACTION,
    "batch_norm_momentum": SHARE,
    "batch_norm_epsilon": ABOVE_0,
    "head_std": FROM_0,
    "layer_decay": (SMALL, 1),
    "drop_path": FRACTION,
    "mixup": FROM_0,
    "cutmix": FROM_0,
    "mixup_switch": SHARE,
    "random_erasing": SHARE,
    "label_smoothing": FRACTION,
    "horizontal_flip": SHARE,
    "vertical_flip": SHARE,
    "quarter_turns": SHARE,
    "num_steps": COUNT,
    "warmup_steps": FROM_0,
    "crop": COUNT,
    "overlap": FROM_0,
    "max_share": SHARE,
    "channels": FROM_0,
    "dropout": FRACTION,
    "k": (1, LARGE),
    "temperature": ABOVE_0,
    "memory": (1, LARGE),
}
# (low, high) fields: maximum
PAIRS = {"crop_area": 1.0, "crop_ratio": math.inf, "crop_scale": math.inf}
CHOICES = {"interpolation": tuple(INTERPOLATIONS), "dtype": DTYPES}
# The fields that replace a recipe's defaults.
Changes = Mapping[str, Any] | ml_collections.ConfigDict | None


def published_probe() -> ml_collections.ConfigDict:
    """The linear probe of Cross-Scale MAE's main_linprobe.py, with MAE's crops.

    Batch, epochs, warm-up and rates are its defaults. LARS's numbers come from
    util/lars.py (MoCo v3's). The crops come from MAE's main_linprobe.py: torchvision's
    RandomResizedCrop with its default area 0.08-1, bicubic, and a horizontal flip.
    Cross-Scale MAE's own util/datasets.py has an area of 0.25-1 and both flips.
    """
    return ml_collections.ConfigDict(
        {
            "batch_size": 512,
            "epochs": 50.0,
            "warmup_epochs": 10.0,
            "learning_rate": 0.1,  # for a batch of `learning_rate_batch`
            "learning_rate_batch": 256,
            "min_learning_rate": 0.0,
            "momentum": 0.9,
            "trust_coefficient": 0.001,
            "weight_decay": 0.0,
            "batch_norm_momentum": 0.1,  # weight of the new value; PyTorch's default
            "batch_norm_epsilon": 1e-6,
            "head_std": 0.01,
            **_crops(),
        }
    )


def finetuning() -> ml_collections.ConfigDict:
    """The fine-tuning of MAE (He et al. 2022, table 9), which Cross-Scale MAE uses.

    The rate and the minimum rate are the defaults of main_finetune.py (--blr,
    --min_lr). The paper's own rate for ImageNet is 5e-4 for ViT-B with batches of 1024.
    AdamW's betas are PyTorch's. The paper also uses RandAugment. It is left out because
    its colour operations are made for photographs.
    """
    return ml_collections.ConfigDict(
        {
            "batch_size": 256,
            "epochs": 100.0,
            "warmup_epochs": 5.0,
            "learning_rate": 1e-3,  # for a batch of `learning_rate_batch`
            "learning_rate_batch": 256,
            "min_learning_rate": 1e-6,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.999,
            "layer_decay": 0.75,
            "drop_path": 0.1,
            "mixup": 0.8,  # parameter of the beta distribution
            "cutmix": 1.0,  # parameter of the beta distribution
            "mixup_switch": 0.5,  # probability of cutmix if both are on
            "random_erasing": 0.25,
            "label_smoothing": 0.1,
            "head_std": 2e-5,
            "dtype": "float32",  # of the computation; parameters are always float32
            **_crops(),
        }
    )


def frozen_upernet() -> ml_collections.ConfigDict:
    """UperNet on a frozen encoder: PANGAEA's AdamW, with MTP's length and crops.

    PANGAEA (Marsocci et al. 2024) lowers the rate in two steps, this recipe by a
    cosine.
    """
    return ml_collections.ConfigDict(
        {
            "batch_size": 16,
            "num_steps": 80_000,
            "warmup_steps": 1500,
            "learning_rate": 1e-4,
            "min_learning_rate": 0.0,
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.999,
            "channels": 0,  # of the head; 0: 512 for ViT-B and larger, 256 for S, 128
            "dropout": 0.1,
            "dtype": "float32",  # of the computation; parameters are always float32
            **_labelled_crops(),
        }
    )


def trained_upernet() -> ml_collections.ConfigDict:
    """UperNet with the whole encoder: MTP's recipe for LoveDA (Wang et al. 2024).

    MTP's rate of drop path is 0.3. This is 0.1, as in mmsegmentation's recipe of MAE.
    """
    recipe = frozen_upernet()
    recipe.learning_rate = 6e-5
    recipe.layer_decay = 0.9
    recipe.drop_path = 0.1
    return recipe


def linear_segmentation() -> ml_collections.ConfigDict:
    """DINOv3's linear segmentation (Siméoni et al. 2025), on features computed once.

    So there is no augmentation, and 10,000 steps instead of 40,000.
    """
    crops = _labelled_crops()
    return ml_collections.ConfigDict(
        {
            "batch_size": 16,
            "num_steps": 10_000,
            "warmup_steps": 0,
            "learning_rate": 1e-3,
            "min_learning_rate": 0.0,
            "weight_decay": 1e-3,
            "b1": 0.9,
            "b2": 0.999,
            "batch_norm_momentum": 0.1,  # weight of the new value; PyTorch's default
            "batch_norm_epsilon": 1e-5,
            "head_std": 0.01,
            **{name: crops[name] for name in ("crop", "overlap")},
        }
    )


def retrieval_segmentation() -> ml_collections.ConfigDict:
    """Dense kNN of patches, by the numbers of Hummingbird (Balazevic et al. 2023)."""
    crops = _labelled_crops()
    return ml_collections.ConfigDict(
        {
            "batch_size": 16,
            "k": 30,  # neighbours of a patch
            "temperature": 0.02,  # of the cosine similarities
            "memory": 100_000,  # training patches that are kept, drawn at random
            **{name: crops[name] for name in ("crop", "overlap")},
        }
    )


def _labelled_crops() -> dict[str, Any]:
    """Crops of images with masks, and the windows of the test images."""
    return {
        "crop": 512,  # pixels
        "overlap": 128,  # pixels that neighbouring windows of a test image share
        "crop_scale": (0.5, 2.0),
        "max_share": 0.75,  # of the most frequent class in a crop
        "horizontal_flip": 0.5,
        "vertical_flip": 0.5,
        "quarter_turns": 1.0,
    }


def _crops() -> dict[str, Any]:
    """torchvision's RandomResizedCrop, and MAE's flips."""
    return {
        "crop_area": (0.08, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "interpolation": "bicubic",
        "horizontal_flip": 0.5,
        "vertical_flip": 0.0,
    }


def define_flags(values: flags.FlagValues) -> None:
    """The flags of a training besides its recipe."""
    flags.DEFINE_integer(
        "num_workers",
        0,
        "Processes that read images during training. Any number gives the same images.",
        lower_bound=0,
        flag_values=values,
    )


def changed(
    recipe: ml_collections.ConfigDict, changes: Changes
) -> ml_collections.ConfigDict:
    """The recipe with some fields replaced, checked."""
    for name, value in (changes or {}).items():
        if name not in recipe:
            known = ", ".join(sorted(recipe))
            raise UserError(f"recipe.{name} does not exist, expected one of {known}")
        try:
            recipe[name] = value
        except TypeError:
            usual = f"a value such as {recipe[name]!r}"
            raise UserError(f"recipe.{name}={value!r}, expected {usual}") from None
    check(recipe)
    return recipe


def check(recipe: ml_collections.ConfigDict) -> None:
    """Raise UserError, with the name, for the first field out of its range."""
    fields = recipe.to_dict()
    check_numbers(fields, RANGES, "recipe.")
    for name, value in fields.items():
        fits = True
        if name in PAIRS:
            fits = len(value) == 2 and 0 < value[0] <= value[1] <= PAIRS[name]
        elif name in CHOICES:
            fits = value in CHOICES[name]
        if not fits:
            raise UserError(f"recipe.{name}={value}, expected {expected(name)}")
    for shorter, longer in (
        ("warmup_epochs", "epochs"),
        ("warmup_steps", "num_steps"),
        ("overlap", "crop"),
    ):
        if shorter in fields and fields[shorter] >= fields[longer]:
            raise UserError(
                f"recipe.{shorter}={fields[shorter]:g}, expected less than "
                f"recipe.{longer}={fields[longer]:g}: lower the first or raise the "
                "second"
            )


def expected(name: str) -> str:
    """The allowed values of a field, in words."""
    if name in PAIRS:
        return f"(low, high) with 0 < low <= high <= {PAIRS[name]:g}"
    if name in CHOICES:
        return f"one of {', '.join(CHOICES[name])}"
    return expected_number(*RANGES[name])


def describe(recipe: ml_collections.ConfigDict) -> dict[str, Any]:
    """Every field as a plain JSON value, for result rows."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in recipe.items()
    }


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of a training in steps, and its learning-rate schedule."""

    num_steps: int
    learning_rate: optax.Schedule


def create_plan(recipe: Mapping[str, Any], *, num_images: int) -> Plan:
    """Convert epochs to steps; linear warm-up from 0, then cosine to the minimum rate.

    Raises UserError if there are fewer images than one batch.
    """
    batch = recipe["batch_size"]
    if num_images < batch:
        raise UserError(
            f"recipe.batch_size={batch} is more than the {num_images} usable training "
            f"images: give --recipe.batch_size={num_images} or less"
        )
    per_epoch = num_images / batch
    num_steps = math.ceil(recipe["epochs"] * per_epoch)
    schedule = warmup_cosine(
        recipe["learning_rate"] * batch / recipe["learning_rate_batch"],
        num_steps=num_steps,
        warmup_steps=min(round(recipe["warmup_epochs"] * per_epoch), num_steps - 1),
        end=recipe["min_learning_rate"],
    )
    return Plan(num_steps, schedule)


def create_plan_of_steps(recipe: Mapping[str, Any]) -> Plan:
    """`recipe.num_steps`; linear warm-up from 0, then cosine to the minimum rate."""
    schedule = warmup_cosine(
        recipe["learning_rate"],
        num_steps=recipe["num_steps"],
        warmup_steps=recipe["warmup_steps"],
        end=recipe["min_learning_rate"],
    )
    return Plan(recipe["num_steps"], schedule)


def create_crops(recipe: Mapping[str, Any], *, size: int) -> ViewSampler:
    """Random resized crops of `size` pixels, each with its own GSD."""
    return ViewSampler(
        num_views=1,
        size=size,
        area=recipe["crop_area"],
        ratio=recipe["crop_ratio"],
        area_distribution="uniform",
        interpolation=recipe["interpolation"],
        horizontal_flip=recipe["horizontal_flip"],
        vertical_flip=recipe["vertical_flip"],
    )
