"""Several data sets in one run, each with its share of the samples.

`mix:parts=geotiff+eurosat_ms` mixes the data of these configs. Its parts are named
after them (a second `geotiff` is `geotiff2`), and their fields are
`--config.data.parts.geotiff.root=DIR`, `--config.data.parts.geotiff.weight=2`.
"""

import importlib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from xsmae.configs import common

from xsmae.errors import UserError

PARTS = ("csv", "eurosat", "eurosat_ms", "fmow", "folder", "geotiff", "tfds")


def get_config(argument=None):
    """`[parts=NAME+NAME][,preset][,method=METHOD][,size=SIZE]`, see common.py."""
    options = (argument or "").split(",")
    given = [option for option in options if option.startswith("parts=")]
    names = (given or ["parts=geotiff+geotiff"])[-1].removeprefix("parts=").split("+")
    others = ",".join(option for option in options if option not in given)
    options = common.parse_argument(others, size="small")
    config = common.get_common(**options)
    config.data = dict(
        source="mix",
        parts=_parts(names),
        bands=placeholder(tuple),  # by name, of every part; those of each part
        split=placeholder(str),  # all, train or test, of every part; as each part says
        test_fraction=placeholder(float),  # of every part
        each_once=False,  # True: without weights, as evaluations read the images
    )
    # Chosen by the images and the device, and said at the start of a run.
    config.dtype = placeholder(str)  # uint8 or float32, as the images have it
    config.units = placeholder(str)
    config.wavelengths = placeholder(tuple)  # nm, of each band; those of the sensor
    config.bands = placeholder(tuple)
    config.batch_size = placeholder(int)  # at most 256
    config.views.size = placeholder(int)  # at most 128
    config.model.patch_size = placeholder(int)  # 16, of small images 8
    config.model.dtype = placeholder(str)  # bfloat16, on CPUs float32
    config.mean = placeholder(tuple)  # measured on a sample
    config.std = placeholder(tuple)
    # A patch counts 1 at this GSD; give one about the middle of the parts.
    config.model.reference_gsd = 10.0
    config.num_epochs = 100.0
    config.optim.warmup_epochs = 10.0
    config.optim.learning_rate = 1.5e-4  # MAE's, for shorter runs on smaller data
    config.knn.train.update(split="train", each_once=True)
    config.knn.test.update(split="test", each_once=True)
    return config


def _parts(names):
    """Name -> the `data` of the config of that name, and a weight."""
    parts = ConfigDict()
    for name in names:
        if name not in PARTS:
            raise UserError(
                f"parts={'+'.join(names)}: {name!r}, expected some of "
                f"{', '.join(PARTS)}, joined by +"
            )
        candidates = (name, *(f"{name}{n}" for n in range(2, len(names) + 1)))
        own = next(candidate for candidate in candidates if candidate not in parts)
        module = importlib.import_module(f"xsmae.configs.{name}")
        parts[own] = ConfigDict(module.get_config().data)
        parts[own].weight = 1.0  # share of the samples, relative to the other weights
    return parts
