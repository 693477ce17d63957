"""The bands of official checkpoints, and how their code normalises the values.

- RGB: Cross-Scale MAE as fMoW; MAE and Scale-MAE as ImageNet (Scale-MAE:
  config/fmow.yaml); SatMAE: util/datasets.py, CustomDatasetFromImages.
- SatMAE on fMoW-Sentinel, util/datasets.py, SentinelIndividualImageDataset: 13 bands of
  Sentinel-2 L1C without `--dropped_bands`, in the published pretraining 0 9 10. Its
  SentinelNormalize gives the network (x - (mean - 2 std)) / (4 std), clipped to 0-1 and
  rounded to 8 bits. Here that is a mean and a std, without the clipping and rounding.
"""

from __future__ import annotations

import ml_collections

from xsmae.bands import BANDS, Bands
from xsmae.data.sensors import SENSORS, wavelengths_of
from xsmae.weights.official_config import OfficialFile

FMOW = (0.43393, 0.43579, 0.40744), (0.19828, 0.19250, 0.19454)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {  # (mean, std) of RGB
    "cross_scale_mae": FMOW,
    "mae": IMAGENET,
    "scale_mae": IMAGENET,
    "sat_mae": (
        (0.4182007312774658, 0.4214799106121063, 0.3991275727748871),
        (0.28774282336235046, 0.27541765570640564, 0.2764017581939697),
    ),
}
SENTINEL = "sentinel2_l1c"
DROPPED = (0, 9, 10)  # B01, B09, B10
# SatMAE's groups of the other ten bands (models_mae_group_channels.py).
GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))


def published_bands(
    file: OfficialFile, method: str, channels: int, groups: tuple[tuple[int, ...], ...]
) -> Bands | None:
    """The bands that a checkpoint of `channels` bands was trained on; None if unknown.

    Without saved arguments, only SatMAE's published groups of ten bands are known.
    """
    if channels == 3:
        return Bands(BANDS, *STATISTICS[method])
    if method != "sat_mae" or not groups:
        return None
    sensor, dataset = SENSORS[SENTINEL], file.saved.get("dataset_type")
    if dataset is None and not file.saved and groups == GROUPS:
        dropped = DROPPED
    elif dataset == "sentinel":
        dropped = tuple(file.saved.get("dropped_bands", ()))
    else:
        return None
    kept = [i for i in range(len(sensor.bands)) if i not in dropped]
    if len(kept) != channels:
        return None
    names = tuple(sensor.bands[i] for i in kept)
    return Bands(
        names,
        mean=tuple(sensor.mean[i] - 2 * sensor.std[i] for i in kept),
        std=tuple(4 * sensor.std[i] for i in kept),
        units=sensor.units,
        dtype="float32",
        wavelengths=wavelengths_of(SENTINEL, names),
    )


def set_bands(config: ml_collections.ConfigDict, bands: Bands) -> None:
    """Put bands into a config; those of 8-bit images need no dtype and units."""
    with config.ignore_type(), config.unlocked():
        config.bands, config.mean, config.std = bands.names, bands.mean, bands.std
        for name in ("dtype", "units", "wavelengths"):
            if name in config:
                del config[name]
        if bands.dtype != "uint8":
            config.dtype, config.units = bands.dtype, bands.units
            config.wavelengths = bands.wavelengths


def bands_note(config: ml_collections.ConfigDict) -> str:
    """What was taken as published, for a file whose bands are not red, green, blue."""
    return (
        f"bands and values as published: {', '.join(config.bands)}, "
        f"{config.units} as --data.sensor={SENTINEL} gives it; the official code also "
        "clips what it normalised to 0-1 and rounds it to 8 bits, which xsmae does not"
    )
