"""xsmae plan --config=fmow --topology=tpu:v5e:16x16

Compiles the training step for other machines, without them. Prints the memory that each
device needs, the data that devices exchange, and the largest batch that fits.
"""

from __future__ import annotations

import json

import jax
from absl import flags

from xsmae.cli.arguments import define_config, given_fields, parse
from xsmae.cli.command import example, run
from xsmae.errors import UserError
from xsmae.planning.step import make_plan, table
from xsmae.planning.topology import describe_topology
from xsmae.run import choices
from xsmae.weights import warm_start as init


def define_flags(values: flags.FlagValues) -> None:
    """The flags that decide the training step, and the machines."""
    define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        "The machines: gpu:CHIP:GPUS[xHOSTS] or tpu:CHIP:SHAPE, such as gpu:h200:8 or "
        "tpu:v5e:16x16.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "largest_batch",
        True,
        "Also find the largest batch, which compiles the step two more times.",
        flag_values=values,
    )


def plan(argv: list[str]) -> int:
    """Compile and print; returns the exit status."""
    jax.config.update("jax_platforms", "cpu")  # use only the described devices
    values = parse(argv, define_flags, example=example(__doc__))
    if values.topology is None:
        raise UserError(f"--topology is missing: {example(__doc__)}")
    topology = describe_topology(values.topology)
    given = given_fields(argv)
    if values.config.init:
        for change in init.adopt(values.config, given):
            print(f"taken from the weights: {change}")
    said = choices.fit_warmup(values.config, given)
    config, chosen = choices.settle(values.config, None, devices=topology.devices)
    found = make_plan(config, topology, largest=values.largest_batch)
    print(*said, *chosen, table(found), sep="\n")
    print(json.dumps({"topology": values.topology, "jax": jax.__version__, **found}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae plan`; returns the exit status."""
    return run(plan, argv, doc=__doc__, sections={"Flags": define_flags})
