"""The command line of the evaluation binaries: their flags, and how they end."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from xsmae.config import find_config, joined
from xsmae.errors import UserError, memory_shortage
from xsmae.evaluation import scales as scales_of
from xsmae.evaluation.features import FEATURES
from xsmae.evaluation.subjects import MISSING_BANDS
from xsmae.process.signals import StopRequest

PARTS = ("train", "test")
LESS_MEMORY = (
    "lower --batch_size (where something is trained, --recipe.batch_size), or leave "
    "the largest of --scales out"
)


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
    argv = find_config(joined(argv, "data"), "data")
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


def data_of(argv: list[str]) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config of `--data` with the parts `data`, `train` and `test`, and the rest of
    the arguments. Raises UserError, in one line, for what is wrong in them."""
    argv = find_config(joined(argv, "data"), "data")
    config = _load_config([a for a in argv if re.match("--?data=", a)])
    for part in ("data", *PARTS):
        given = [a for a in argv if a.lstrip("-").startswith(f"{part}.")]
        config[part] = _part(config, part, given)
    return config, [
        a for a in argv if not re.match("--?(data=|(data|train|test)[.])", a)
    ]


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
    common: Callable[[flags.FlagValues], None] = define_flags,
) -> int:
    """Call `main(argv, should_stop)`; returns the exit status.

    0, 2 for a UserError, 128 + n where signal n stopped it. `--help` prints `doc` and
    the flags that `common` and `define` define.
    """
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "--helpfull"} & set(argv):
        values = flags.FlagValues()
        common(values)
        define(values)
        print(doc, values.get_help(), sep="\n\n")
        return 0
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of errors
    with StopRequest() as stop:
        try:
            with memory_shortage(LESS_MEMORY):
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
        # Unset fields are references, which a shallow copy shares: --test.root would
        # set --train.root too. `data` shares them with `model`, on purpose.
        start = copy.deepcopy(start)
        start.update(config.knn[part])
    return _overridden(part, start, given)


def _overridden(
    name: str, config: ml_collections.ConfigDict, given: list[str]
) -> ml_collections.ConfigDict:
    """`config` with the fields set that --`name`.FIELD=VALUE of `given` set."""
    values = flags.FlagValues()
    for argument in given:
        field = argument.partition("=")[0].partition(".")[2]
        if field.partition(".")[0] not in config:
            raise UserError(
                f"{argument}: there is no such field, expected one of "
                f"{', '.join(sorted(config))}"
            )
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
        raise UserError(f"{what}: {message.removeprefix(f'flag {what}: ')}") from None
