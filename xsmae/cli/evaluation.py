"""Shared by all evaluations: flags, their data, and how they run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from xsmae.cli import command
from xsmae.cli.arguments import parse_flags, split_fields
from xsmae.config import override, read_config
from xsmae.errors import UserError
from xsmae.evaluation import scales as scales_of
from xsmae.evaluation.features import FEATURES
from xsmae.evaluation.fitting.recipe import expected
from xsmae.evaluation.reading import MISSING_BANDS

PARTS = ("train", "test")
LESS_MEMORY = (
    "lower --batch_size (in a training, --recipe.batch_size), or remove the largest of "
    "--scales"
)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of every evaluation."""
    string, integer = (
        lambda name, default, text, define=define: define(
            name, default, text, flag_values=values
        )
        for define in (flags.DEFINE_string, flags.DEFINE_integer)
    )
    string(
        "encoder",
        None,
        "The encoder to measure: a run's workdir, an exported encoder, "
        "RUN/checkpoints/STEP, random:SIZE[,FIELD=VALUE...] (fields of the config's "
        "model), statistics or thumbnail.",
    )
    define_data(values)
    string("name", None, "The encoder's name in tables. Default: the run's folder.")
    flags.DEFINE_list(
        "scales",
        [f"{percent:g}" for percent in scales_of.SCALES],
        "Sizes of the images, in percent of the base size. Default of the published "
        "probe, of fine-tuning and of segmentation: 100.",
        flag_values=values,
    )
    integer(
        "base_size",
        0,
        "Pixels at 100 %. 0 means 256, or the images' side if that is smaller. Not for "
        "segmentation.",
    )
    flags.DEFINE_enum(
        "gsd",
        "true",
        scales_of.GSD_POLICIES,
        "The GSD that the encoder gets. true: the GSD of each scale. fixed: the GSD of "
        "100 % at every scale, as an ablation.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "feature",
        list(FEATURES),
        "The class token, the mean patch, or both. Default of the published probe: "
        "cls; of fine-tuning: mean. Not for segmentation.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "missing_bands",
        "refuse",
        MISSING_BANDS,
        "What to do if the encoder reads bands that the images lack: fill them with "
        "their mean, or refuse.",
        flag_values=values,
    )
    integer("seed", 0, "The seed of random encoders and of the intervals.")
    integer(
        "batch_size",
        64,
        "How many images the encoder gets at a time. Not for segmentation.",
    )
    string("results", "results.jsonl", "The file that result rows are added to.")
    string(
        "cache",
        ".cache/xsmae/features",
        "The folder that keeps features and trainings.",
    )


def define_data(values: flags.FlagValues) -> None:
    """Define the flag --data."""
    flags.DEFINE_string(
        "data",
        None,
        "The images: NAME[:ARGUMENT], a config as in pretraining, such as folder or "
        "configs/folder.py. --data.FIELD=VALUE sets a field of its `data` for both "
        "parts, --train.FIELD=VALUE or --test.FIELD=VALUE for one part. --train.split "
        "and --test.split also take the path of a list. By default the parts are those "
        "of the config's kNN monitor.",
        flag_values=values,
    )


def parse(
    argv: list[str],
    define: Callable[[flags.FlagValues], None],
    *,
    doc: str,
    recipe_of: Callable[[flags.FlagValues], ml_collections.ConfigDict | None] = (
        lambda values: None
    ),
) -> tuple[flags.FlagValues, ml_collections.ConfigDict]:
    """Parse `argv`; returns the flags, and the config of `--data` with both parts.

    define: adds the command's own flags to those of `define_flags`. recipe_of(values):
    a recipe or None. The config gets it as `recipe`, changed by --recipe.FIELD=VALUE.
    doc: begins with an example. Raises a one-line UserError.
    """
    fields, rest = split_parts(argv, "recipe")
    values = flags.FlagValues()
    define_flags(values)
    define(values)
    parse_flags(values, rest)
    config = parts_of(values, fields, doc=doc, needed=("encoder", "data"))
    recipe, given = recipe_of(values), fields["recipe"]
    if recipe is not None:
        config.recipe = override(recipe, given, "recipe")
    elif given:
        raise UserError(f"{', '.join(given)}, but this has no recipe: leave it out")
    return values, config


def split_parts(
    argv: Sequence[str], *others: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Split off the arguments that set fields of the data, its parts and `others`."""
    return split_fields(argv, ["data", *PARTS, *others])


def parts_of(
    values: flags.FlagValues,
    fields: Mapping[str, list[str]],
    *,
    doc: str,
    needed: Sequence[str] = ("data",),
) -> ml_collections.ConfigDict:
    """The config of `--data`; `fields` set its `data`, `train` and `test`.

    needed: the flags that must be given. doc: begins with an example.
    """
    missing = [f"--{name}" for name in needed if values[name].value is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"{' and '.join(missing)} {verb} missing: {command.example(doc)}"
        )
    for name in needed:
        times = values[name].present
        if times > 1:
            raise UserError(f"--{name} is given {times} times, expected once")
    config = read_config(values.data, f"--data={values.data}").unlock()
    for part in ("data", *PARTS):
        # `data` comes first, because the parts start from its fields.
        start = ml_collections.ConfigDict(config.data)
        if part in PARTS:
            # Unset fields are references, and a shallow copy shares them: --test.root
            # would set --train.root too. `data` shares them with `model` on purpose.
            start = copy.deepcopy(start)
            start.update(config.knn[part])
        config[part] = override(start, fields[part], part)
    return config


def default(values: flags.FlagValues, name: str, value: Sequence[str]) -> None:
    """Change the default of a flag."""
    if not values[name].present:
        values[name].value = list(value)


def run(
    evaluate: Callable[[list[str], Callable[[], bool]], Any],
    argv: list[str] | None,
    *,
    doc: str,
    define: Callable[[flags.FlagValues], None],
    recipe: Mapping[str, ml_collections.ConfigDict] | None = None,
) -> int:
    """Call `evaluate(argv, should_stop)`; returns the exit status.

    define: defines the command's own flags. recipe: title in the help -> the recipe
    whose fields are listed below it.
    """

    def call(argv: list[str], should_stop: Callable[[], bool]) -> int:
        evaluate(argv, should_stop)
        return 0

    sections = {"Flags": define, "Flags of every evaluation": define_flags}
    for title, fields in (recipe or {}).items():
        sections[title] = functools.partial(_define_recipe, recipe=fields)
    return command.run(
        command.stoppable(call),
        argv,
        doc=doc,
        sections=sections,
        less_memory=LESS_MEMORY,
    )


def _define_recipe(
    values: flags.FlagValues, *, recipe: ml_collections.ConfigDict
) -> None:
    """Define a flag per field, for the help only."""
    kinds = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, value in recipe.items():
        define = kinds.get(type(value), flags.DEFINE_string)
        default = value if type(value) in kinds else str(value)
        about = f"Expected: {expected(name)}."
        define(f"recipe.{name}", default, about, flag_values=values)
