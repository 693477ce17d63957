"""xsmae predict scenes/a.tif scenes/b.tif --head=runs/buildings --out=maps

Uses a trained head. A head of xsmae segment maps scenes of any size. For each scene
SCENE.tif it writes into the folder --out:

    SCENE_classes.tif        the class of every pixel, 255 where the scene has no value
    SCENE_probabilities.tif  with --probabilities: a band for each class
    SCENE_overlay.png        the classes over the scene, with a legend

The GeoTIFFs are cloud-optimized and have the scene's CRS and transform. The memory is
that of a strip of rows. A command that was stopped or killed resumes: give it again. A
scene that cannot be mapped is named with its reason, and the next one follows; the exit
status is then 3.

A head of xsmae probe or xsmae finetune labels whole images:

    xsmae predict images --gsd=0.5 --head=heads/ID --out=labels.csv

It writes one row per image: id, label, probability, p_CLASS for every class and, if the
images have labels, true_label. The file is CSV, or Parquet if its name ends so. Instead
of a folder, --data=configs/NAME.py --data.FIELD=VALUE labels any data set. Images that
cannot be used are left out and named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from absl import flags

from xsmae.cli.arguments import parse_flags
from xsmae.cli.command import example, run, stoppable
from xsmae.cli.evaluation import define_data, split_parts
from xsmae.cli.images import open_images, say_written
from xsmae.data.gdal import dataset_name
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError, printable
from xsmae.evaluation.labels import write_labels
from xsmae.evaluation.reading import MISSING_BANDS
from xsmae.scenes.maps import Outputs, map_scene
from xsmae.weights.classifier import Classifier
from xsmae.weights.head import Head, load_head

FAILED = 3
STOPPED = "stopped; the same command resumes a map, and starts a table of labels again"
OF_SCENES = ("probabilities", "bands", "sensor", "scale", "offset")


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def number(name, text):
        flags.DEFINE_float(name, None, text, flag_values=values)

    string("head", None, "The folder of a trained head, or of its result.")
    string(
        "out",
        None,
        "The folder of maps, by default maps; or the file of labels, by default "
        "labels.csv.",
    )
    define_data(values)
    flags.DEFINE_boolean(
        "probabilities",
        False,
        "Also write the probability of each class, 0 to 254; 255: no value.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch_size",
        None,
        "How many windows or images the head gets at a time, by default 8 windows or "
        "64 images.",
        flag_values=values,
        lower_bound=1,
    )
    number("gsd", "Metres per pixel of images, or of scenes where no CRS says it.")
    string("gsd_csv", None, "Of a folder of images: a table with the columns path,gsd.")
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
        "What to do if the head reads bands that the images lack: fill them with "
        "their mean, or refuse.",
        flag_values=values,
    )


def predict(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Map all scenes, or label all images; returns the exit status."""
    fields, rest = split_parts(argv)
    values = flags.FlagValues()
    define_flags(values)
    given = parse_flags(values, rest, files=True)
    of_data = values.data is not None or any(fields.values())
    if not values.head or not (given or of_data):
        missing = "a scene, a folder or --data" if values.head else "--head"
        raise UserError(f"{missing} is missing: {example(__doc__)}")
    head = load_head(values.head)
    if isinstance(head, Classifier):
        return _label(head, given, values, fields, should_stop)
    wrong = "--data" if of_data else "--gsd_csv" if values.gsd_csv else ""
    if wrong:
        raise UserError(
            f"{wrong} is for heads that label whole images, but {values.head} "
            "segments: give the paths of scenes, or a head of xsmae probe or finetune"
        )
    return _map_all(head, given, values, should_stop)


def _label(
    head: Classifier,
    folders: list[str],
    values: flags.FlagValues,
    fields: dict[str, list[str]],
    should_stop: Callable[[], bool],
) -> int:
    """Label the images of a folder or a data set."""
    files = [folder for folder in folders if Path(folder).is_file()]
    if files:
        raise UserError(
            f"{printable(files[0])} is a file, but {values.head} labels whole images, "
            "expected a folder of images with --gsd=METRES, or --data=configs/NAME.py; "
            "a map of a scene needs a head of xsmae segment"
        )
    for name in OF_SCENES:
        if values[name].present:
            raise UserError(
                f"--{name} is for scenes, but {values.head} labels whole images: leave "
                f"it out, or give --data.{name} with --data"
            )
    source, _ = open_images(folders, values, fields, doc=__doc__)
    out = values.out or "labels.csv"
    found = write_labels(
        head,
        source,
        out,
        missing_bands=values.missing_bands,
        batch_size=values.batch_size or 64,
        should_stop=should_stop,
    )
    say_written(found, out, shown=None)
    return 0


def _map_all(
    head: Head,
    scenes: list[str],
    values: flags.FlagValues,
    should_stop: Callable[[], bool],
) -> int:
    """Map all scenes."""
    outputs = _outputs(scenes, Path(values.out or "maps"))
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
            batch_size=values.batch_size or 8,
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
        stoppable(predict, STOPPED),
        argv,
        doc=__doc__,
        sections={"Flags": define_flags},
        less_memory="lower --batch_size",
    )
