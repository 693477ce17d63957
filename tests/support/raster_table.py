"""`python -m tests.support.raster_table DIR`: the real rasters, found and expected.

DIR has GEOTIFF.csv and its files. Each raster is opened as a user would open it: the
presets and scales that it needs are in `OPTIONS`. The exit status says whether every
row is as expected, or differs for the reason in `DIFFERENT`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from pathlib import Path

from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError

EUROSAT = {"sensor": "eurosat_ms"}
L1C, L2A = {"sensor": "sentinel2_l1c"}, {"sensor": "sentinel2_l2a"}
OPTIONS = {
    "naip/naip_nd_20190904.tif": {"sensor": "naip"},
    "naip/naip_nd_20200831.tif": {"sensor": "naip"},
    "edge/naip_nonsquare_pixels.tif": {"sensor": "naip"},
    "edge/landsat_dateline.tif": {"scale": 0.00002, "offset": -0.1},
    "edge/s1_grd_gcps_only.tif": {"scale": 1, "gsd": 10},
    "rasterio/rotated.tif": {"gsd": (10, 20)},
    "landsat/l8_l1_8band_30m.tif": {"sensor": "landsat_c2_l1"},
    "eurosat_ms/SeaLake_1300.tif": EUROSAT,
    "eurosat_ms/Industrial_1145.tif": EUROSAT,
    "eurosat_ms/AnnualCrop_1412.tif": EUROSAT,
    "sentinel2/s2_l1c_spain_13band_4326.tif": L1C,
    "sentinel2/s2_l1c_6band_20m.tif": L1C,
    "sentinel2/s2_l1c_3band_60m.tif": L1C,
    "sentinel2/bigearthnet_patch_10m.tif": L2A,
    "sentinel2/bigearthnet_patch_20m.tif": L2A,
    "sentinel2/bigearthnet_patch_60m.tif": L2A,
}
# The table's fractions are GDAL's own, of `dataset_mask`.
NAN = "NaN is never valid; GDAL's mask says nothing of it"
DIFFERENT = {
    "sentinel2/s2_l1c_lahinch_2017-09-26.tif": NAN,
    "sentinel2/s2_l1c_lahinch_2017-10-08.tif": NAN,
    "sentinel2/s2_l1c_waterville_tiny.tif": NAN,
    "edge/naip_nonsquare_pixels.tif": "band 4 is near infrared, GDAL's mask is of it",
}
# The 1 % of GEOTIFF.csv.
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Line:
    """What was found of one raster; outcome: "as expected", a reason, or an error."""

    file: str
    bands: int | None
    expected_bands: int
    dtype: str
    gsd: tuple[float, float] | None
    expected_gsd: tuple[float, float] | None
    valid: float | None
    expected_valid: float
    outcome: str

    @property
    def passed(self) -> bool:
        """True unless it differs without a reason."""
        return self.outcome == "as expected" or self.outcome in DIFFERENT.values()


def read_table(folder: Path) -> list[Line]:
    """A line for each row of GEOTIFF.csv."""
    with (folder / "GEOTIFF.csv").open(newline="") as file:
        return [_line(folder, row) for row in csv.DictReader(file)]


def _line(folder: Path, row: dict[str, str]) -> Line:
    name = row["file"]
    expected_gsd = None
    if row["res_m_y"]:
        expected_gsd = float(row["res_m_y"]), float(row["res_m_x"])
    alpha = row["band_order"].endswith(",A")
    expected = {
        "file": name,
        "expected_bands": int(row["bands"]) - alpha,
        "expected_gsd": expected_gsd,
        "expected_valid": float(row["valid_fraction"]),
    }
    try:
        with open_raster(folder / name, **OPTIONS.get(name, {})) as raster:
            side = min(32, *raster.shape)
            raster.read((0, 0, *raster.shape), size=side)
            found = {
                "bands": len(raster.bands),
                "dtype": raster.dtype,
                "gsd": raster.gsd,
                "valid": raster.valid_fraction(),
            }
    except (UserError, BadImageError) as error:
        nothing = {"bands": None, "dtype": "", "gsd": None, "valid": None}
        return Line(**expected, **nothing, outcome=str(error))
    line = Line(**expected, **found, outcome="")
    return dataclasses.replace(line, outcome=_outcome(line, row["dtype"]))


def _outcome(line: Line, dtype: str) -> str:
    wrong = []
    if (line.bands, line.dtype) != (line.expected_bands, dtype):
        wrong.append("bands or dtype differ")
    if line.expected_gsd is not None and not all(
        math.isclose(a, b, rel_tol=TOLERANCE)
        for a, b in zip(line.gsd, line.expected_gsd, strict=True)
    ):
        wrong.append("GSD differs")
    near = abs(line.valid - line.expected_valid) <= TOLERANCE
    if line.file in DIFFERENT and line.valid != line.expected_valid and not wrong:
        return DIFFERENT[line.file]
    if not near:
        wrong.append("valid fraction differs")
    return ", ".join(wrong) or "as expected"


def shown(line: Line) -> str:
    """The line as text; GSDs are y x x, in metres."""

    def gsd(pair: tuple[float, float] | None) -> str:
        return "none" if pair is None else f"{pair[0]:.4g} x {pair[1]:.4g}"

    valid = "-" if line.valid is None else f"{line.valid:.4f}"
    return (
        f"{line.file:40} {line.bands!s:>4} {line.dtype:8} {gsd(line.gsd):>15} "
        f"{gsd(line.expected_gsd):>15} {valid:>7} {line.expected_valid:.4f}  "
        f"{line.outcome}"
    )


def main(arguments: list[str]) -> int:
    """Prints the table."""
    lines = read_table(Path(arguments[0]))
    print(
        f"{'file':40} {'band':>4} {'dtype':8} {'GSD, m':>15} {'expected':>15} "
        f"{'valid':>7} {'exp.':6}  outcome"
    )
    print("\n".join(map(shown, lines)))
    failed = [line for line in lines if not line.passed]
    print(f"{len(lines) - len(failed)} as expected or differ for a reason, ", end="")
    print(f"{len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
