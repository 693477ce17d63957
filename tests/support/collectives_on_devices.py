"""Prints JSON about programs with known collectives, on all devices."""

import json

import jax
import jax.numpy as jnp

from xsmae.planning.collectives import read_collectives
from xsmae.sharding import by_batch, create_mesh, replicated


def main():
    devices = jax.device_count()
    mesh = create_mesh(devices, f"data:-1,fsdp:{devices // 2}")

    def summed_in_a_loop(x):
        def body(total, _):
            summed = (x * total.sum()).sum(axis=0)
            return jax.lax.with_sharding_constraint(summed, replicated(mesh)), None

        return jax.lax.scan(body, jnp.ones(x.shape[1]), None, length=5)[0]

    def gathered(x):
        return x

    x = jax.ShapeDtypeStruct((8 * devices, 100), jnp.float32)
    found = {"devices": devices}
    for function in (summed_in_a_loop, gathered):
        compiled = jax.jit(
            function, in_shardings=by_batch(mesh), out_shardings=replicated(mesh)
        )
        text = compiled.lower(x).compile().as_text()
        exchanged = read_collectives(text, devices, 2)
        found[function.__name__] = [vars(one) for one in exchanged]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
