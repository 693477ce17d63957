"""Prints JSON about attention and its gradient with the batch divided over devices."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xsmae.ops.attention.api import attention

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def main():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_batch = NamedSharding(mesh, PartitionSpec("data"))
    tokens, num_heads, head_dim = 17, 2, 16
    key, key_bar = jax.random.split(jax.random.key(0))
    width = num_heads * head_dim
    found = {}
    # `auto` leaves the choice to the lowering only in bfloat16.
    for implementation, dtype in (("pallas", jnp.float32), ("auto", jnp.bfloat16)):
        qkv = jax.random.normal(key, (16, tokens, 3 * width), dtype)
        out_bar = jax.random.normal(key_bar, (16, tokens, width), dtype)
        attend = functools.partial(
            attention, num_heads=num_heads, implementation=implementation
        )

        def both(qkv, out_bar, attend=attend):
            # Operations before and after; the kernel must not change their layout.
            out, pullback = jax.vjp(lambda qkv: attend(jnp.sin(qkv)), qkv)
            return out * 2, pullback(out_bar)[0]

        alone = jax.jit(both)(qkv, out_bar)
        divided = (
            jax.jit(both)
            .lower(*(jax.device_put(x, by_batch) for x in (qkv, out_bar)))
            .compile()
        )
        results = divided(*(jax.device_put(x, by_batch) for x in (qkv, out_bar)))
        found[implementation] = {
            "error": max(
                float(np.abs(np.asarray(x - y, np.float32)).max())
                for x, y in zip(alone, results, strict=True)
            ),
            "of a device": [x.sharding.shard_shape(x.shape)[0] for x in results],
            "collectives": [x for x in COLLECTIVES if x in divided.as_text()],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
