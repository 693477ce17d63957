"""What the evaluation binaries have in common: their flags, and what these name."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from xsmae.errors import UserError
from xsmae.evaluation import scales as scales_of
from xsmae.evaluation.features import FEATURES
from xsmae.evaluation.frozen import (
    MISSING_BANDS,
    PIXEL_CONTROLS,
    FrozenEncoder,
    open_encoder,
    pixel_control,
    random_encoder,
)
from xsmae.evaluation.measure import (
    Measurement,
    Outcome,
    check_features,
    measure,
)
from xsmae.evaluation.parts import Parts, open_parts
from xsmae.evaluation.protocol import Protocol, Result
from xsmae.evaluation.table import terminal_table
from xsmae.main import find_config
from xsmae.signals import StopRequest

PARTS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Setup:
    """An evaluation's flags, opened."""

    encoder: FrozenEncoder
    parts: Parts
    scales: list[scales_of.Scale]
    base_size: int


def define_flags(values: flags.FlagValues) -> None:
    """The flags of every evaluation but for the fields of the data."""
    string, integer = (
        lambda name, default, text, define=define: define(
            name, default, text, flag_values=values
        )
        for define in (flags.DEFINE_string, flags.DEFINE_integer)
    )
    string(
        "encoder",
        None,
        "An exported encoder, a workdir, RUN/checkpoints/STEP, "
        "random:SIZE[,FIELD=VALUE...] (fields of the config's model), statistics or "
        "thumbnail.",
    )
    string("name", None, "What tables call the encoder. Default: the run's folder.")
    string(
        "data",
        None,
        "A config as in pretraining, configs/NAME.py. Fields of its `data` are set for "
        "both parts by --data.FIELD=VALUE, for one by --train.FIELD=VALUE or "
        "--test.FIELD=VALUE; --train.split and --test.split take the path of a list "
        "too. Without them, the parts are those of the config's kNN monitor.",
    )
    flags.DEFINE_list(
        "scales",
        [f"{percent:g}" for percent in scales_of.SCALES],
        "Percent of the base size. Where a classifier is trained, 100 by default.",
        flag_values=values,
    )
    integer(
        "base_size",
        0,
        "Pixels at 100 %. 0: 256, or the images' own side where that is less.",
    )
    flags.DEFINE_enum(
        "gsd",
        "true",
        scales_of.GSD_POLICIES,
        "What the encoder is told: the true GSD of each scale, or, as an ablation, "
        "that of 100 % at every scale.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "feature",
        list(FEATURES),
        "Class token, mean patch, or both. By default both; cls where the published "
        "probe is trained, mean where the encoder is fine-tuned.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "missing_bands",
        "refuse",
        MISSING_BANDS,
        "What an encoder of more bands than the images have is given for the others: "
        "their mean, or it is refused.",
        flag_values=values,
    )
    integer("seed", 0, "Of the random encoders and of the intervals.")
    integer("batch_size", 64, "Images that the encoder gets at a time.")
    string("results", "results.jsonl", "Where the rows are added.")
    string("cache", ".cache/xsmae/features", "Where features and trainings are kept.")


def parse(
    argv: list[str],
    define: Callable[[flags.FlagValues], None],
    recipe_of: Callable[[flags.FlagValues], ml_collections.ConfigDict | None] = (
        lambda values: None
    ),
) -> tuple[flags.FlagValues, ml_collections.ConfigDict]:
    """The flags of `argv`, and the config of `--data`, in which `train` and `test` are.

    `define` adds the binary's flags to those of `define_flags`. `recipe_of(values)`,
    where it is not None, is in the config as `recipe`, changed by --recipe.FIELD=VALUE.
    Raises UserError, in one line, for what is wrong in them.
    """
    argv = find_config(_joined(argv, ("data",)), "data")
    config = _load_config([a for a in argv if re.match("--?data=", a)])
    values = flags.FlagValues()
    define_flags(values)
    define(values)
    overrides = re.compile(r"--?(data|train|test|recipe)\.")
    given = [a for a in argv if overrides.match(a)]
    rest = [a for a in argv if not overrides.match(a)]
    with _as_user_error("flags"):
        unknown = values(rest)[1:]
        if unknown:
            raise UserError(f"unknown arguments: {' '.join(unknown)}")
    if values.encoder is None:
        raise UserError(
            "--encoder is missing: give a run's workdir, random:tiny, statistics, ..."
        )
    of = {
        part: [a for a in given if a.lstrip("-").startswith(f"{part}.")]
        for part in ("data", *PARTS, "recipe")
    }
    for part in ("data", *PARTS):
        config[part] = _part(config, part, of[part])
    recipe = recipe_of(values)
    if recipe is not None:
        config.recipe = _overridden("recipe", recipe, of["recipe"])
    elif of["recipe"]:
        raise UserError(f"{', '.join(of['recipe'])}: nothing is trained by a recipe")
    return values, config


def open_setup(values: flags.FlagValues, config: ml_collections.ConfigDict) -> Setup:
    """What the flags name, opened and checked against each other."""
    try:
        percents = [float(text) for text in values.scales]
    except ValueError:
        raise UserError(
            f"scales={','.join(values.scales)}, expected percent such as 12.5,25,50,100"
        ) from None
    for name, low in (("batch_size", 1), ("seed", 0), ("base_size", 0)):
        if values[name].value < low:
            raise UserError(f"{name}={values[name].value}, expected {low} or more")
    encoder = open_encoder(
        values.encoder,
        config=config,
        seed=values.seed,
        name=values.name,
        missing_bands=values.missing_bands,
    )
    parts = open_parts(_name(config), config.train.to_dict(), config.test.to_dict())
    base = values.base_size or scales_of.base_size(parts.train)
    scales = scales_of.create_scales(
        percents, base=base, patch_size=encoder.patch_size, gsd_policy=values.gsd
    )
    return Setup(encoder, parts, scales, base)


def measure_all(
    setup: Setup,
    values: flags.FlagValues,
    protocol: Protocol,
    outcomes_of: Callable[[Measurement, scales_of.Scale], Iterable[Outcome]],
    *,
    should_stop: Callable[[], bool],
    random_control: bool = True,
    pixel_controls: bool = True,
    finish: Callable[[Measurement], None] = lambda job: None,
) -> list[Result]:
    """The rows of the encoder and of its controls; prints their table.

    The controls are the encoder's architecture with random weights, and what needs no
    network. `outcomes_of` is `Measurement.outcomes`; `finish` is called with every
    measurement once its rows are written.
    """
    encoders = [setup.encoder]
    if random_control and setup.encoder.kind == "encoder":
        random = random_encoder(
            setup.encoder.info, seed=values.seed, missing_bands=values.missing_bands
        )
        encoders.append(random)
    if pixel_controls:
        kinds = [kind for kind in PIXEL_CONTROLS if kind != setup.encoder.kind]
        encoders += map(pixel_control, kinds)
    rows = []
    for encoder in encoders:
        job = Measurement(
            encoder=encoder,
            parts=setup.parts,
            scales=setup.scales,
            protocol=protocol,
            features=check_features(encoder, values.feature),
            seed=values.seed,
            outcomes=outcomes_of,
            results=Path(values.results),
            cache=Path(values.cache),
            batch_size=values.batch_size,
            should_stop=should_stop,
        )
        rows += measure(job)
        finish(job)
    print(terminal_table(rows), f"rows: {values.results}", sep="\n", flush=True)
    return rows


def default(values: flags.FlagValues, name: str, value: Sequence[str]) -> None:
    """Give a flag another default than `define_flags` does."""
    if not values[name].present:
        values[name].value = list(value)


def run(
    main: Callable[[list[str], Callable[[], bool]], None],
    argv: list[str] | None,
    *,
    doc: str,
    define: Callable[[flags.FlagValues], None],
) -> int:
    """Call `main(argv, should_stop)`; returns the exit status.

    0, 2 for a UserError, 128 + n where signal n stopped it. `--help` prints `doc` and
    the flags.
    """
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "--helpfull"} & set(argv):
        values = flags.FlagValues()
        define_flags(values)
        define(values)
        print(doc, values.get_help(), sep="\n\n")
        return 0
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file at INFO
    with StopRequest() as stop:
        try:
            main(argv, lambda: stop.signal is not None)
        except UserError as error:
            print(f"xsmae: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("xsmae: stopped; the same command goes on from here", file=sys.stderr)
            return 128 + (stop.signal or 2)
    return 0


def _load_config(arguments: list[str]) -> ml_collections.ConfigDict:
    if len(arguments) != 1:
        raise UserError(
            f"--data is given {len(arguments)} times, expected once: a config such as "
            "--data=configs/folder.py"
        )
    values = flags.FlagValues()
    with _as_user_error("--data"), _arguments(["xsmae", *arguments]):
        config_flags.DEFINE_config_file("data", flag_values=values, lock_config=False)
        values(["xsmae", *arguments])
        return values.data


def _part(
    config: ml_collections.ConfigDict, part: str, given: list[str]
) -> ml_collections.ConfigDict:
    """`config.data` with the overrides of `part`, the config's and then the flags'."""
    start = ml_collections.ConfigDict(config.data)
    if part in PARTS:
        start.update(config.knn[part])
    return _overridden(part, start, given)


def _overridden(
    name: str, config: ml_collections.ConfigDict, given: list[str]
) -> ml_collections.ConfigDict:
    """`config` with the fields set that --`name`.FIELD=VALUE of `given` set."""
    values = flags.FlagValues()
    with _as_user_error(", ".join(given)), _arguments(["xsmae", *given]):
        config_flags.DEFINE_config_dict(name, config, flag_values=values)
        rest = values(["xsmae", *given])[1:]
        if rest:
            raise UserError(f"unknown arguments: {' '.join(rest)}")
        return values[name].value


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """ml_collections reads the overrides in sys.argv, whatever it is given."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (flags.Error, KeyError, AttributeError, ValueError, TypeError) as error:
        message = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(f"{what}: {message}") from None


def _joined(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """`--data FILE` as `--data=FILE`."""
    joined, argv = [], list(argv)
    while argv:
        argument = argv.pop(0)
        if argument.lstrip("-") in names and argument.startswith("-") and argv:
            argument = f"{argument}={argv.pop(0)}"
        joined.append(argument)
    return joined


def _name(config: ml_collections.ConfigDict) -> str:
    """What the data is called: TFDS's name, or that of its folder or table."""
    for data in (config.data, config.train):
        if data.get("name"):
            return data.name
        place = data.get("root") or data.get("csv_path")
        if place:
            return Path(place).absolute().stem
    return config.data.source
