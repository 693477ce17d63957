"""Linear probe of frozen features: `python -m xsmae.linear_probe --encoder=RUN ...`.

Features are extracted once, a multinomial logistic regression is fitted for each of a
grid of L2 penalties, and the penalty is chosen on a part of the training images. The
same is measured of the controls: image statistics, a thumbnail, and the encoder's
architecture with random weights.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from absl import flags

from xsmae.errors import UserError
from xsmae.evaluation import commandline
from xsmae.evaluation.features import RESIZES
from xsmae.evaluation.measure import INTERVAL
from xsmae.evaluation.probe import PENALTIES, VALIDATION, sweep_predict
from xsmae.evaluation.protocol import Protocol, Result


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this binary alone."""
    flags.DEFINE_list(
        "penalties",
        [f"{penalty:g}" for penalty in PENALTIES],
        "The L2 penalties to choose from.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "validation",
        VALIDATION,
        "The part of each class's training images that the penalty is chosen on.",
        flag_values=values,
    )


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure what the flags name, and its controls; prints the table."""
    values, config = commandline.parse(argv, define_flags)
    try:
        penalties = sorted({float(text) for text in values.penalties})
    except ValueError:
        penalties = []
    if not penalties or penalties[0] < 0 or not 0 < values.validation < 1:
        raise UserError(
            f"penalties={','.join(values.penalties)}, validation={values.validation}, "
            "expected numbers of 0 or more, and a fraction between 0 and 1"
        )
    setup = commandline.open_setup(values, config)
    protocol = Protocol(
        task="linear_probe",
        metric="accuracy",
        data=setup.parts.describe(),
        base_size=setup.base_size,
        resize=RESIZES["area"],
        gsd_policy=values.gsd,
        options={
            "classifier": "logistic regression, L-BFGS, standardised features",
            "penalties": penalties,
            "validation": values.validation,
        },
        interval=INTERVAL,
    )

    def predict_with(encoder):
        return functools.partial(
            sweep_predict,
            penalties=penalties,
            validation=values.validation,
            seed=values.seed,
            should_stop=should_stop,
            say=lambda line: print(f"{encoder.name}: {line}", flush=True),
        )

    return commandline.measure_all(
        setup, values, protocol, predict_with, should_stop=should_stop
    )


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    return commandline.run(evaluate, argv, doc=__doc__, define=define_flags)


if __name__ == "__main__":
    sys.exit(main())
