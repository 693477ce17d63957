"""Your own images with masks: the folders `images/` and `masks/`, or a table.

Needs `--data.root=DIR`, and `--data.gsd=METRES` unless the images are rasters with a
CRS. For `xsmae check-data` and segmentation; pretraining takes images without masks.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import common, geotiff


def get_config(argument=None):
    """argument: `[preset][,method=METHOD][,size=SIZE]`; see common.py."""
    options = common.parse_argument(argument, size="small")
    config = geotiff.get_config(",".join(f"{k}={v}" for k, v in options.items()))
    config.data = dict(
        source="masks",
        root=placeholder(str),  # a folder, or a table path,mask,scene,gsd
        images=placeholder(str),  # the folder of the images; "images"
        masks=placeholder(str),  # the folder of the masks; "masks"
        classes=placeholder(str),  # "classes.json" in the folder
        gsd=placeholder(float),  # metres per pixel, where no CRS says it
        scene=placeholder(str),  # a pattern whose group is the scene, as in (.+)_[0-9]+
        bands=placeholder(tuple),  # of rasters, by name and in order
        sensor=placeholder(str),  # band names, scale and offset of a known product
        scale=placeholder(float),  # of rasters: value = number * scale + offset
        offset=placeholder(float),
        nodata_rule="all",  # a pixel is invalid if "all" or "any" bands are nodata
        split="all",  # or "train" and "test", of scenes, or a list of ids
        test_fraction=0.2,  # of the scenes
        max_pixels=89_478_485,
    )
    config.knn.train.split = "train"
    config.knn.test.split = "test"
    return config
