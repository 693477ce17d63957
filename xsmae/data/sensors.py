"""Sensors whose products are known: band names in order, wavelengths, scale, offset.

A raster of integers says rarely what its numbers mean. A preset does, if the user names
it: values = numbers * scale + offset. Archives disagree about some of it, so that none
is ever chosen by itself.

Sources:

- Sentinel-2: wavelengths are the central ones of Sentinel-2A in ESA's "Sentinel-2
  Spectral Response Functions" (S2-SRF). Values are (number + offset) / 10000. The
  offset is -1000 since processing baseline 04.00 (25 January 2022, and older scenes
  that were processed again) and 0 before: RADIO_ADD_OFFSET and BOA_ADD_OFFSET in the
  product's metadata, whose PROCESSING_BASELINE says which preset is right. Number 0 is
  no data. Some archives (Earth Engine's "HARMONIZED" collections, for one) have already
  subtracted the 1000: their numbers are those of before 04.00.
- Mean and standard deviation of Sentinel-2 L1C: those of fMoW-Sentinel, in SatMAE's
  `util/datasets.py` (SentinelIndividualImageDataset), divided by 10000.
- EuroSAT multispectral: L1C of before 04.00. B8A is the LAST band in its files,
  whatever lists say: the tests compare it with B08.
- Landsat 8 and 9: wavelengths are the middle of the ranges in USGS's "What are the band
  designations for the Landsat satellites?". Collection 2 Level 2: 0.0000275 and -0.2,
  fill 0, in USGS's "How do I use a scale factor with Landsat Level-2 science
  products?". Level 1: value = 2.0E-5 * number - 0.1 for bands 1 to 9, the
  REFLECTANCE_MULT_BAND and REFLECTANCE_ADD_BAND of LEVEL1_RADIOMETRIC_RESCALING in the
  MTL files of Landsat 8 and 9. USGS's "Using the USGS Landsat Level-1 Data Product"
  calls the result reflectance without correction for the solar angle: the
  top-of-atmosphere reflectance is this value divided by the sine of SUN_ELEVATION,
  which differs between scenes. The preset cannot know it, so its units say so.
- HLS (Harmonized Landsat Sentinel-2): 0.0001, and 0.01 degrees Celsius for the two
  thermal bands of L30, on https://hls.gsfc.nasa.gov/products-description/l30/. Fill
  -9999 in the "HLS Product User Guide", version 2.0.
- NAIP: red, green, blue, near infrared in 8 bits. Cameras differ from year to year, so
  that no wavelengths are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xsmae.bands import known_or_empty
from xsmae.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sensor:
    """What a product's files hold.

    bands: names in the order of the files. wavelengths: of each band, in nm, or None.
    scale, offset: of each band, value = number * scale + offset. units: of the values.
    nodata: the number of pixels without a value. dtypes: of the files. mean, std: of
    each band's values, published; None where nobody has.
    """

    name: str
    bands: tuple[str, ...]
    wavelengths: tuple[float | None, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    units: str
    nodata: float | None
    dtypes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def band_key(name: str) -> str:
    """The same text for B1, B01, b01 and SR_B1."""
    key = name.strip().lower().removeprefix("sr_")
    head, digits = key[:1], key[1:]
    return f"b{int(digits)}" if head == "b" and digits.isdecimal() else key


_S2 = {
    "B01": 442.7, "B02": 492.4, "B03": 559.8, "B04": 664.6, "B05": 704.1, "B06": 740.5,
    "B07": 782.8, "B08": 832.8, "B8A": 864.7, "B09": 945.1, "B10": 1373.5,
    "B11": 1613.7, "B12": 2202.4,
}  # fmt: skip
_S2_L1C = tuple(_S2)
_S2_L2A = tuple(name for name in _S2 if name != "B10")  # cirrus: no surface is seen
_S2_EUROSAT = (*(name for name in _S2 if name != "B8A"), "B8A")
_S2_MEAN = (
    1370.19151926, 1184.3824625, 1120.77120066, 1136.26026392, 1263.73947144,
    1645.40315151, 1846.87040806, 1762.59530783, 1972.62420416, 582.72633433,
    14.77112979, 1732.16362238, 1247.91870117,
)  # fmt: skip
_S2_STD = (
    633.15169573, 650.2842772, 712.12507725, 965.23119807, 948.9819932,
    1108.06650639, 1258.36394548, 1233.1492281, 1364.38688993, 472.37967789,
    14.3114637, 1310.36996126, 1087.6020813,
)  # fmt: skip
_OLI = {
    "B1": 440.0, "B2": 480.0, "B3": 560.0, "B4": 655.0, "B5": 865.0, "B6": 1610.0,
    "B7": 2200.0, "B8": 590.0, "B9": 1370.0,
}  # fmt: skip
_TIRS = {"B10": 10895.0, "B11": 12005.0}

_TOA = "top-of-atmosphere reflectance"
_SURFACE = "surface reflectance"
_16_BITS = ("uint16", "int16")


def _sentinel2(name: str, bands: tuple[str, ...], shift: int, units: str) -> Sensor:
    statistics = {}
    if "l1c" in name and not shift:
        statistics = {
            "mean": tuple(x / 10000 for x in _S2_MEAN),
            "std": tuple(x / 10000 for x in _S2_STD),
        }
    return Sensor(
        name=name,
        bands=bands,
        wavelengths=tuple(_S2[band] for band in bands),
        scale=(1 / 10000,) * len(bands),
        offset=(shift / 10000,) * len(bands),
        units=units,
        nodata=0,
        dtypes=_16_BITS,
        **statistics,
    )


def _landsat(
    name: str, bands: dict[str, str], scale: float, offset: float, units: str
) -> Sensor:
    """bands: name in the files -> name among OLI's."""
    return Sensor(
        name=name,
        bands=tuple(bands),
        wavelengths=tuple(_OLI[band] for band in bands.values()),
        scale=(scale,) * len(bands),
        offset=(offset,) * len(bands),
        units=units,
        nodata=0,
        dtypes=("uint16",),
    )


def _hls(name: str, wavelengths: dict[str, float], thermal: int) -> Sensor:
    reflective = len(wavelengths) - thermal
    return Sensor(
        name=name,
        bands=tuple(wavelengths),
        wavelengths=tuple(wavelengths.values()),
        scale=(0.0001,) * reflective + (0.01,) * thermal,
        offset=(0.0,) * len(wavelengths),
        units=_SURFACE + (", thermal bands in degrees Celsius" if thermal else ""),
        nodata=-9999,
        dtypes=("int16",),
    )


SENSORS = {
    sensor.name: sensor
    for sensor in (
        _sentinel2("sentinel2_l1c", _S2_L1C, 0, _TOA),
        _sentinel2("sentinel2_l1c_since_0400", _S2_L1C, -1000, _TOA),
        _sentinel2("sentinel2_l2a", _S2_L2A, 0, _SURFACE),
        _sentinel2("sentinel2_l2a_since_0400", _S2_L2A, -1000, _SURFACE),
        _sentinel2("eurosat_ms", _S2_EUROSAT, 0, _TOA),
        _landsat(
            "landsat_c2_l2",
            {f"SR_B{i}": f"B{i}" for i in range(1, 8)},
            0.0000275,
            -0.2,
            _SURFACE,
        ),
        _landsat(
            "landsat_c2_l1",
            {name: name for name in _OLI},
            0.00002,
            -0.1,
            f"{_TOA} times the sine of the sun's elevation",
        ),
        _hls(
            "hls_l30",
            {
                f"B{int(name[1:]):02}": wavelength
                for name, wavelength in {**_OLI, **_TIRS}.items()
                if name != "B8"
            },
            thermal=2,
        ),
        _hls("hls_s30", _S2, thermal=0),
        Sensor(
            name="naip",
            bands=("red", "green", "blue", "nir"),
            wavelengths=(None,) * 4,
            scale=(1 / 255,) * 4,
            offset=(0.0,) * 4,
            units="digital numbers 0-255 divided by 255",
            nodata=None,
            dtypes=("uint8",),
        ),
    )
}


def wavelengths_of(
    sensor: str | None, bands: Sequence[str]
) -> tuple[float | None, ...]:
    """The wavelength of each band in nm, None where the preset has none.

    () without a preset, or if it knows none.
    """
    preset = find_sensor(sensor)
    if preset is None:
        return ()
    known = dict(zip(map(band_key, preset.bands), preset.wavelengths, strict=True))
    return known_or_empty([known.get(band_key(band)) for band in bands])


def find_sensor(name: str | None) -> Sensor | None:
    """The preset of a name, None for None; UserError if there is none."""
    if name is None or name in SENSORS:
        return SENSORS.get(name)
    raise UserError(f"sensor={name!r} is not known; expected {', '.join(SENSORS)}")
