"""xsmae predict scenes/a.tif scenes/b.tif --head=runs/buildings --out=maps

Maps scenes of any size with a trained segmentation head. For each scene SCENE.tif it
writes into the folder --out:

    SCENE_classes.tif        the class of every pixel, 255 where the scene has no value
    SCENE_probabilities.tif  with --probabilities: a band for each class
    SCENE_overlay.png        the classes over the scene, with a legend

The GeoTIFFs are cloud-optimized and have the scene's CRS and transform. The memory is
that of a strip of rows. A command that was stopped or killed resumes: give it again. A
scene that cannot be mapped is named with its reason, and the next one follows; the exit
status is then 3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from absl import flags

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run, stoppable
from xsmae.data.gdal import dataset_name
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError, printable
from xsmae.evaluation.reading import MISSING_BANDS
from xsmae.scenes.maps import Outputs, map_scene
from xsmae.weights.head import Head, load_head

FAILED = 3


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def number(name, text):
        flags.DEFINE_float(name, None, text, flag_values=values)

    string("head", None, "The folder of a segmentation head.")
    string("out", "maps", "The folder to write to.")
    flags.DEFINE_boolean(
        "probabilities",
        False,
        "Also write the probability of each class, 0 to 254; 255: no value.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch_size",
        8,
        "How many windows the head gets at a time.",
        flag_values=values,
        lower_bound=1,
    )
    number("gsd", "Metres per pixel, where no CRS says it.")
    flags.DEFINE_list(
        "bands",
        None,
        "Names of the scenes' bands, to choose some, or one name for each band.",
        flag_values=values,
    )
    string("sensor", None, "A known product: band names, scale and offset.")
    number("scale", "Value = number * scale + offset.")
    number("offset", "See --scale.")
    flags.DEFINE_enum(
        "missing_bands",
        "refuse",
        MISSING_BANDS,
        "What to do if the head reads bands that the scenes lack: fill them with "
        "their mean, or refuse.",
        flag_values=values,
    )


def predict(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Map all scenes; returns the exit status."""
    values = flags.FlagValues()
    define_flags(values)
    scenes = parse_flags(values, argv, files=True)
    if not scenes or not values.head:
        missing = "--head" if scenes else "a scene"
        raise UserError(f"{missing} is missing: {example(__doc__)}")
    outputs = _outputs(scenes, Path(values.out))
    head = load_head(values.head)
    failed = 0
    for scene, target in zip(scenes, outputs, strict=True):
        name = printable(scene)
        if should_stop():
            raise KeyboardInterrupt
        try:
            new = _map(head, scene, target, values, should_stop)
        except (UserError, BadImageError) as error:
            failed += 1
            reason = printable(str(error))
            reason = reason.removeprefix(f"{printable(dataset_name(scene))}: ")
            print(f"failed: {name}: {reason}", flush=True)
            continue
        said = "" if new else ", which was there"
        print(printable(f"{name}: {target.classes}{said}"), flush=True)
    if failed:
        print(f"{failed} of {len(scenes)} scenes failed", flush=True)
    return FAILED if failed else 0


def _map(
    head: Head,
    scene: str,
    target: Outputs,
    values: flags.FlagValues,
    should_stop: Callable[[], bool],
) -> bool:
    options = {n: values[n].value for n in ("bands", "scale", "offset", "gsd")}
    with open_raster(scene, **options, sensor=values.sensor) as raster:
        for note in raster.notes():
            print(printable(f"{scene}: {note}"), flush=True)
        return map_scene(
            head,
            raster,
            target,
            probabilities=values.probabilities,
            batch_size=values.batch_size,
            missing_bands=values.missing_bands,
            say=lambda line: print(printable(f"{scene}: {line}"), flush=True),
            should_stop=should_stop,
        )


def _outputs(scenes: list[str], folder: Path) -> list[Outputs]:
    """The files of each scene; UserError if two scenes have the same."""
    found: dict[str, str] = {}
    for scene in scenes:
        other = found.get(Path(scene).stem)
        if other is not None:
            raise UserError(
                f"{printable(other)} and {printable(scene)} would be written to the "
                "same files: map them with two commands and two --out"
            )
        found[Path(scene).stem] = scene
    return [Outputs(folder, name) for name in found]


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae predict`; returns the exit status."""
    return run(
        stoppable(predict),
        argv,
        doc=__doc__,
        sections={"Flags": define_flags},
        less_memory="lower --batch_size",
    )
