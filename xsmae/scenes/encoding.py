"""Runs an encoder on chips: in groups of one size, on all devices of the process.

A product of matrices may round differently for another number of rows. So each group
has the same number of chips, whatever the batch size and the number of devices are, and
the same chips give the same bits.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xsmae.models.pooling import pool
from xsmae.weights.encoder import Encoder

if TYPE_CHECKING:
    from jaxtyping import Float

    Images = Float[np.ndarray, "n height width bands"]

GROUPS = {"cpu": 8}  # chips of a group by platform
OTHER_GROUP = 64
PRECISIONS = ("auto", "float32", "bfloat16")


def dtype_of(precision: str) -> str:
    """The dtype of an encoder's products; precision: one of `PRECISIONS`."""
    if precision != "auto":
        return precision
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@functools.partial(jax.jit, static_argnames=("graphdef", "bands", "pooling", "fixed"))
def _encode(state, images, gsd, *, graphdef, bands, pooling, fixed):
    network = nnx.merge(graphdef, state)
    tokens = network(bands.normalize(images), gsd=None if fixed else gsd)
    tokens = tokens.astype(jnp.float32)
    return tokens[:, 1:] if pooling is None else pool(tokens, pooling)


class Groups:
    """An encoder on `devices`, by default all of this process.

    pooling: `cls` or `mean` for a vector for each chip; None for those of all patches.
    batch_size: chips that are on their way to the devices or back, at least a group
    for each device.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        pooling: str | None,
        batch_size: int,
        devices: Sequence[Any] | None = None,
    ):
        self.devices = list(devices or jax.local_devices())
        self.size = GROUPS.get(self.devices[0].platform, OTHER_GROUP)
        self.ahead = max(-(-batch_size // self.size), len(self.devices))
        self.width = encoder.info["architecture"]["embed_dim"]
        self._next = 0  # the device of the next group
        graphdef, state = nnx.split(encoder.network)
        fixed = encoder.info["architecture"]["position"] == "fixed"
        self._encode = functools.partial(
            _encode,
            graphdef=graphdef,
            bands=encoder.bands,
            pooling=pooling,
            fixed=fixed,
        )
        self._states = [jax.device_put(state, device) for device in self.devices]

    def run(
        self, chips: Iterator[tuple[Any, np.ndarray | None, np.ndarray | None]]
    ) -> Iterator[tuple[list[Any], np.ndarray]]:
        """Groups of keys and their vectors, in the order of `chips`.

        chips: (key, image, gsd). A key with None for an image ends a group early, and
        comes back alone, without vectors, when all before it are done.
        """
        waiting: collections.deque = collections.deque()
        keys, images, gsds = [], [], []

        def send():
            if keys:
                result = self._send(np.stack(images), np.stack(gsds))
                waiting.append((list(keys), result))
                for found in (keys, images, gsds):
                    found.clear()

        for key, image, gsd in chips:
            if image is None:
                send()
                waiting.append(([key], None))
            else:
                keys.append(key)
                images.append(image)
                gsds.append(gsd)
                if len(keys) == self.size:
                    send()
            while len(waiting) > self.ahead:
                yield _done(waiting.popleft())
        send()
        while waiting:
            yield _done(waiting.popleft())

    def _send(self, images: Images, gsd: np.ndarray) -> jax.Array:
        if len(images) < self.size:
            missing = (0, self.size - len(images))
            images = np.pad(images, [missing, *[(0, 0)] * 3], "edge")
            gsd = np.pad(gsd, [missing, (0, 0)], "edge")
        place = self._next % len(self.devices)
        self._next += 1
        device = self.devices[place]
        return self._encode(self._states[place], *jax.device_put((images, gsd), device))


def _done(entry: tuple[list[Any], jax.Array | None]) -> tuple[list[Any], np.ndarray]:
    keys, result = entry
    if result is None:
        return keys, np.zeros((0, 0), np.float32)
    return keys, np.asarray(result)[: len(keys)]


def ahead_of(
    items: Iterator[Any], call: Callable[[Any], Any], pool: Any, many: int
) -> Iterator[Any]:
    """(item, call(item)) in order; `many` items are read ahead by the threads."""
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(call, item)))
            if len(waiting) > many:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
