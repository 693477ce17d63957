"""Prints JSON with the meshes of all devices for a JSON list of [axes, batch size]."""

import json
import sys

import jax
import numpy as np

from xsmae.errors import UserError
from xsmae.sharding import by_batch, create_mesh


def describe(axes, batch_size):
    """The sizes of the axes and each device's part of a batch, or the error."""
    try:
        mesh = create_mesh(batch_size, axes)
    except UserError as error:
        return {"refused": str(error)}
    batch = jax.device_put(np.arange(batch_size), by_batch(mesh))
    return {
        "sizes": list(mesh.shape.items()),
        "parts": [part.data.tolist() for part in batch.addressable_shards],
    }


def main():
    cases = json.loads(sys.argv[2])
    print(json.dumps([describe(*case) for case in cases]))


if __name__ == "__main__":
    main()
