"""The flags that all evaluations share, the data that they name, and how they run."""

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
from xsmae.evaluation.subjects import MISSING_BANDS

PARTS = ("train", "test")
LESS_MEMORY = (
    "lower --batch_size (where something is trained, --recipe.batch_size), or leave "
    "the largest of --scales out"
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
        "What is measured: a run's workdir, an exported encoder, "
        "RUN/checkpoints/STEP, random:SIZE[,FIELD=VALUE...] (fields of the config's "
        "model), statistics or thumbnail.",
    )
    define_data(values)
    string("name", None, "The encoder's name in tables. Default: the run's folder.")
    flags.DEFINE_list(
        "scales",
        [f"{percent:g}" for percent in scales_of.SCALES],
        "Sizes of the images, in percent of the base size. Default where a classifier "
        "is trained on crops: 100.",
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
        "The GSD that the encoder gets: the true one of each scale, or, as an "
        "ablation, that of 100 % at every scale.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "feature",
        list(FEATURES),
        "The class token, the mean patch, or both. Default of the published probe: "
        "cls; of fine-tuning: mean.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "missing_bands",
        "refuse",
        MISSING_BANDS,
        "What an encoder gets for bands that the images lack: their mean; or refuse "
        "to measure it.",
        flag_values=values,
    )
    integer("seed", 0, "The seed of random encoders and of the intervals.")
    integer("batch_size", 64, "How many images the encoder gets at a time.")
    string("results", "results.jsonl", "The file that result rows are added to.")
    string(
        "cache",
        ".cache/xsmae/features",
        "The folder that keeps features and trainings.",
    )


def define_data(values: flags.FlagValues) -> None:
    """The flag of the data."""
    flags.DEFINE_string(
        "data",
        None,
        "The images: NAME[:ARGUMENT], a config as in pretraining, such as folder or "
        "configs/folder.py. --data.FIELD=VALUE sets a field of its `data` for both "
        "parts, --train.FIELD=VALUE or --test.FIELD=VALUE for one; --train.split and "
        "--test.split take the path of a list too. Without them, the parts are those "
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
    """The flags of `argv`, and the config of `--data`, in which `train` and `test` are.

    `define` adds the command's flags to those of `define_flags`. `recipe_of(values)`,
    where it is not None, is in the config as `recipe`, changed by --recipe.FIELD=VALUE.
    doc: begins with an example. Raises UserError, in one line, for what is wrong.
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
        raise UserError(f"{', '.join(given)}: nothing is trained by a recipe")
    return values, config


def split_parts(
    argv: Sequence[str], *others: str
) -> tuple[dict[str, list[str]], list[str]]:
    """The arguments that set fields of the data, and of `others`, and what is left."""
    return split_fields(argv, ["data", *PARTS, *others])


def parts_of(
    values: flags.FlagValues,
    fields: Mapping[str, list[str]],
    *,
    doc: str,
    needed: Sequence[str] = ("data",),
) -> ml_collections.ConfigDict:
    """The config of `--data` with `data`, `train` and `test` as `fields` set them.

    needed: the flags that must be given. doc: begins with an example.
    """
    missing = [f"--{name}" for name in needed if values[name].value is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"{' and '.join(missing)} {verb} missing: {command.example(doc)}"
        )
    if values["data"].present > 1:
        raise UserError(
            f"--data is given {values['data'].present} times, expected once"
        )
    config = read_config(values.data, f"--data={values.data}").unlock()
    for part in ("data", *PARTS):
        # The fields of `config.data` are set before the parts start from them.
        start = ml_collections.ConfigDict(config.data)
        if part in PARTS:
            # Unset fields are references, which a shallow copy shares: --test.root
            # would set --train.root too. `data` shares them with `model`, on purpose.
            start = copy.deepcopy(start)
            start.update(config.knn[part])
        config[part] = override(start, fields[part], part)
    return config


def default(values: flags.FlagValues, name: str, value: Sequence[str]) -> None:
    """Give a flag another default than `define_flags` does."""
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

    define: defines the command's own flags. recipe: title -> the recipe whose fields
    the help lists.
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
    """A flag for each field, for the help alone."""
    kinds = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, value in recipe.items():
        define = kinds.get(type(value), flags.DEFINE_string)
        default = value if type(value) in kinds else str(value)
        about = f"Expected: {expected(name)}."
        define(f"recipe.{name}", default, about, flag_values=values)
