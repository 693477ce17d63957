"""xsmae segment --encoder=runs/quickstart --data=dubai --data.root=DIR --data.gsd=0.3

Measures an encoder by segmentation: trains a head on the training images and their
masks, and counts the mIoU of the test images. The same architecture with random weights
and, for the linear head, statistics of each pixel's neighbourhood are measured
alongside, as controls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from absl import flags

from xsmae.cli import evaluation as commandline
from xsmae.cli.measure import percents_of, print_table
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe as recipes
from xsmae.evaluation.parts import name_of
from xsmae.evaluation.rows import Result
from xsmae.evaluation.segmentation.evaluate import evaluate_segmentation
from xsmae.evaluation.segmentation.heads import HEADS, Head, recipe_of

# Flags of other evaluations without a meaning here -> what to do instead.
OTHERS = {
    "base_size": "images keep their own size, and --scales are percent of it",
    "feature": "the head decides what it reads",
    "batch_size": "give --recipe.batch_size",
}


def define_flags(values: flags.FlagValues) -> None:
    """This command's own flags."""
    flags.DEFINE_enum(
        "head",
        "linear",
        HEADS,
        "linear: a linear layer on the patches. knn: the most similar training patches "
        "vote. upernet: UperNet on four blocks.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "freeze",
        True,
        "Keep the encoder as it is. --nofreeze trains it together with UperNet.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "controls", True, "Also measure the controls.", flag_values=values
    )
    flags.DEFINE_string(
        "out",
        "segmentation",
        "The folder that gets a folder per result: the confusion matrix of every test "
        "image, a picture of examples and, except for controls and kNN, the head.",
        flag_values=values,
    )


def evaluate(argv: list[str], should_stop: Callable[[], bool]) -> list[Result]:
    """Measure the encoder and its controls; prints the table."""
    from xsmae.figures.triplets import draw_examples

    values, config = commandline.parse(
        argv,
        define_flags,
        doc=__doc__,
        recipe_of=lambda values: recipe_of(values.head, values.freeze),
    )
    for name, instead in OTHERS.items():
        if values[name].present:
            raise UserError(f"--{name} has no meaning for segmentation: {instead}")
    commandline.default(values, "scales", ["100"])
    recipes.check(config.recipe)
    names = ("gsd", "controls", "seed", "name", "missing_bands")
    rows = evaluate_segmentation(
        values.encoder,
        config.train,
        config.test,
        head=Head(values.head, values.freeze, config.recipe.to_dict()),
        results=Path(values.results),
        out=Path(values.out),
        cache=Path(values.cache),
        scales=percents_of(values),
        data_name=name_of(config.data, config.train),
        config=config,
        draw=draw_examples,
        should_stop=should_stop,
        **{name: values[name].value for name in names},
    )
    print_table(rows, values.results)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae segment`; returns the exit status."""
    return commandline.run(
        evaluate,
        argv,
        doc=__doc__,
        define=define_flags,
        recipe={
            "The recipe of --head=linear": recipe_of("linear", True),
            "The recipe of --head=knn": recipe_of("knn", True),
            "The recipe of --head=upernet": recipe_of("upernet", True),
            "The recipe of --head=upernet --nofreeze": recipe_of("upernet", False),
        },
    )
