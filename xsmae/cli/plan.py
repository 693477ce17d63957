"""What a run needs on machines that are not there:

    python -m xsmae.plan --config=configs/fmow.py --topology=tpu:v5e:16x16

Compiles the training step for them and prints the memory of each device, what the
devices send each other, the arithmetic, and the largest batch that fits.
"""

from __future__ import annotations

import json
import sys

import jax
from absl import flags

from xsmae.config import define_config, given_fields, parse
from xsmae.errors import UserError
from xsmae.planning.step import make_plan, table
from xsmae.planning.topology import describe_topology
from xsmae.weights import warm_start as init


def define_flags(values: flags.FlagValues) -> None:
    """The flags of pretraining that decide the step, and the machines."""
    define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        "gpu:CHIP:GPUS[xHOSTS] or tpu:CHIP:SHAPE: gpu:h200:8, tpu:v5e:16x16.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "largest_batch",
        True,
        "Look for the largest batch too, which compiles the step two times more.",
        flag_values=values,
    )


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "--helpfull"} & set(argv):
        values = flags.FlagValues()
        define_flags(values)
        print(__doc__, values.get_help(), sep="\n\n")
        return 0
    jax.config.update("jax_platforms", "cpu")  # no devices but those that are described
    try:
        values = parse(argv, define_flags)
        if values.topology is None:
            raise UserError("--topology=gpu:h200:8, or another, is missing")
        topology = describe_topology(values.topology)
        if values.config.init:
            given = given_fields(argv)
            for change in init.adopt(values.config, given):
                print(f"as the weights have it: {change}")
        plan = make_plan(values.config, topology, largest=values.largest_batch)
    except UserError as error:
        print(f"xsmae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("xsmae: interrupted", file=sys.stderr)
        return 130
    print(table(plan))
    print(json.dumps({"topology": values.topology, "jax": jax.__version__, **plan}))
    return 0
