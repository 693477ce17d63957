"""EuroSAT (Helber et al. 2019), 13 bands of Sentinel-2, 64 px at 10 m per pixel.

Needs `--config.data.root=DIR`, a folder per class of GeoTIFFs. Top-of-atmosphere
reflectance of before processing baseline 04.00; B8A is the last band of the files.
"""

from xsmae.configs import common, geotiff


def get_config(argument=None):
    """`[preset][,method=METHOD][,size=SIZE]`, see common.py."""
    options = common.parse_argument(argument, size="small")
    config = geotiff.get_config(",".join(f"{k}={v}" for k, v in options.items()))
    config.data.update(
        sensor="eurosat_ms",
        labels="folder",
        window=64,
        test_fraction=0.2,
    )
    config.views.size, config.model.patch_size = 64, 8
    return config
