"""Several data sets in one run, each with its share of the samples.

`mix:parts=geotiff+eurosat_ms` mixes the data of these configs. Its parts are named
after them (a second `geotiff` is `geotiff2`), and their fields are
`--config.data.parts.geotiff.root=DIR`, `--config.data.parts.geotiff.weight=2`.
"""

import importlib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from xsmae.configs import geotiff

from xsmae.errors import UserError

PARTS = ("csv", "eurosat", "eurosat_ms", "fmow", "folder", "geotiff", "tfds")


def get_config(argument=None):
    """`[parts=NAME+NAME][,preset][,method=METHOD][,size=SIZE]`, see common.py."""
    options = (argument or "").split(",")
    given = [option for option in options if option.startswith("parts=")]
    names = (given or ["parts=geotiff+geotiff"])[-1].removeprefix("parts=").split("+")
    others = ",".join(option for option in options if option not in given)
    config = geotiff.get_config(others)
    config.data = dict(
        source="mix",
        parts=_parts(names),
        bands=placeholder(tuple),  # by name, of every part; those of each part
        split=placeholder(str),  # all, train or test, of every part; as each part says
        test_fraction=placeholder(float),  # of every part
        each_once=False,  # True: without weights, as evaluations read the images
    )
    # uint8 or float32, chosen by the images like all other fields that are not set.
    config.dtype = placeholder(str)
    config.knn.train.each_once = config.knn.test.each_once = True
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
