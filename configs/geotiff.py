"""Your own GeoTIFFs: windows of scenes, any bands, or a folder of small files.

Needs `--config.data.root=DIR`, and `pip install 'xsmae[geo]'`. Integers of 16 bits need
`--config.data.sensor=NAME`, or a scale and an offset.
"""

from ml_collections.config_dict import placeholder
from xsmae.configs import common


def get_config(argument=None):
    """`[preset][,method=METHOD][,size=SIZE]`, see common.py."""
    options = common.parse_argument(argument, size="small")
    config = common.get_common(**options)
    config.data = dict(
        source="geotiff",
        root=placeholder(str),  # a folder, a table path,label,gsd,bands, or one raster
        window=256,  # pixels, about the side of what views are cut from
        min_valid=0.5,  # the smallest valid part of a window
        bands=placeholder(tuple),  # by name and in order; those of the rasters
        sensor=placeholder(str),  # band names, scale and offset of a known product
        scale=placeholder(float),  # value = number * scale + offset
        offset=placeholder(float),
        gsd=placeholder(float),  # metres per pixel, where no CRS says it
        nodata_rule="all",  # a pixel is invalid if "all" or "any" bands are nodata
        labels="none",  # or "table", its column label; or "folder", the first-level one
        split="all",
        test_fraction=0.1,
        cache=placeholder(str),  # a file for what was found of the rasters
        # The most windows of one block or strip that are read together and follow each
        # other. More are fewer reads, but more neighbours in a batch. 1: no neighbours.
        crops_per_read=8,
    )
    # Values are float32, in the units of the rasters.
    config.dtype = "float32"
    config.units = placeholder(str)
    config.wavelengths = placeholder(tuple)  # nm, of each band; those of the sensor
    # Scenes differ in GSD; a patch counts 1 at this one.
    config.model.reference_gsd = 10.0
    # Chosen by the images and the device, and said at the start of a run.
    config.bands = placeholder(tuple)
    config.batch_size = placeholder(int)  # at most 256
    config.views.size = placeholder(int)  # at most 128
    config.model.patch_size = placeholder(int)  # 16, of small images 8
    config.model.dtype = placeholder(str)  # bfloat16, on CPUs float32
    config.mean = placeholder(tuple)  # measured on a sample
    config.std = placeholder(tuple)
    config.num_epochs = 100.0
    config.optim.warmup_epochs = 10.0
    config.optim.learning_rate = 1.5e-4  # MAE's, for shorter runs on smaller data
    config.knn.train.split = "train"
    config.knn.test.split = "test"
    return config
