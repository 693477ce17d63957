"""xsmae map --embeddings=embeddings --out=maps

Draws the embeddings of scenes, of chips or of patches (--unit=token). For each scene
SCENE of the folder that xsmae embed SCENES wrote, the folder --out gets

    SCENE_components.tif, .png   with --kind=components: three principal components
                                 as red, green and blue
    SCENE_kmeans.tif, .png       with --kind=classes: k-means over all scenes
    A_to_B_difference.tif, .png  with --kind=difference --scene=A --scene=B:
                                 1 - cosine of two scenes of the same ground

Components and classes are fitted once to all scenes of the command, so a colour means
the same in each of its maps. The GeoTIFFs are cloud-optimized, with a cell for each
chip or patch; the pictures show the scene beside its map.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run, stoppable
from xsmae.errors import UserError
from xsmae.scenes.embedding_maps import CLASSES, KINDS, MOST, map_embeddings

OUT = "maps"
STOPPED = "stopped; the same command keeps the maps that are finished"


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("embeddings", None, "The folder that xsmae embed SCENES wrote.")
    flags.DEFINE_enum(
        "kind",
        "components",
        list(KINDS),
        "components: colours; classes: k-means; difference: of two scenes.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "scene",
        [],
        "The name of a scene, without a suffix. Default: all. difference: give two.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "classes",
        None,
        f"For --kind=classes: how many, 2 to {MOST}; by default {CLASSES}.",
        flag_values=values,
    )
    string("out", OUT, "The folder to write to.")


def draw(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Draw the maps and print their files; returns the exit status."""
    values = flags.FlagValues()
    define_flags(values)
    parse_flags(values, argv)
    if not values.embeddings:
        raise UserError(f"--embeddings is missing: {example(__doc__)}")
    map_embeddings(
        values.embeddings,
        values.out,
        kind=values.kind,
        scenes=values.scene,
        classes=values.classes,
        say=lambda line: print(line, flush=True),
        should_stop=should_stop,
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae map`; returns the exit status."""
    return run(
        stoppable(draw, STOPPED), argv, doc=__doc__, sections={"Flags": define_flags}
    )
