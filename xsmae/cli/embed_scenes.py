"""The part of `xsmae embed` that reads scenes: its flags, and the loop over scenes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from xsmae.cli import embed_ray
from xsmae.cli.embed_ray import Engine
from xsmae.data.gdal import dataset_name
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError, printable
from xsmae.process.lock import FolderLock
from xsmae.scenes.chip_table import DTYPES
from xsmae.scenes.chips import Length
from xsmae.scenes.embed import Plan, embed_scene
from xsmae.scenes.encoding import PRECISIONS, Groups, dtype_of
from xsmae.scenes.inputs import parse_times, time_of
from xsmae.scenes.manifest import NAME, Manifest, Shard, merge
from xsmae.scenes.ray_worker import LAYOUTS, Opening
from xsmae.scenes.rows import Here
from xsmae.weights.encoder import load_encoder

FAILED = 3
FORMATS = {"chip": "parquet", "token": "cog"}  # what a vector is of -> the files
OUT = "embeddings"


def define_flags(values: flags.FlagValues) -> None:
    """The flags that are for scenes only."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def number(name, default, text, **bounds):
        flags.DEFINE_float(name, default, text, flag_values=values, **bounds)

    flags.DEFINE_enum(
        "unit",
        "chip",
        list(FORMATS),
        "chip: a vector for each chip; token: for each patch, as a grid.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        None,
        list(FORMATS.values()),
        "parquet: a table of chips; cog: a GeoTIFF of tokens. Default: that of --unit.",
        flag_values=values,
    )
    string(
        "chip_size",
        None,
        "Pixels such as 224, or metres such as 500m. Default: the size of training.",
    )
    string(
        "stride",
        None,
        "From chip to chip, in pixels or metres. Default: the size of a chip.",
    )
    number(
        "min_valid",
        0.5,
        "Chips with a smaller part of valid pixels are left out.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_enum(
        "dtype", "float32", DTYPES, "Of the stored vectors.", flag_values=values
    )
    string(
        "datetime",
        None,
        "When the scenes were taken, if their files do not say it: a time such as "
        "2020-08-31, or an interval, START/END.",
    )
    flags.DEFINE_enum(
        "precision",
        "auto",
        PRECISIONS,
        "Of the encoder's matrix products; auto: bfloat16 on GPUs and TPUs.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "bands",
        None,
        "Names of the scenes' bands, to choose some, or one name for each band.",
        flag_values=values,
    )
    string("sensor", None, "A known product: band names, scale and offset.")
    number("scale", None, "Value = number * scale + offset.")
    number("offset", None, "See --scale.")
    string("shard", None, "Only a part of the scenes: 0/4, 1/4, 2/4 or 3/4.")
    flags.DEFINE_boolean(
        "merge", False, "Join the lists of all shards in --out.", flag_values=values
    )
    embed_ray.define_flags(values)


def embed_scenes(
    scenes: list[str], values: flags.FlagValues, should_stop: Callable[[], bool]
) -> int:
    """Embed all scenes; returns the exit status."""
    folder = Path(values.out or OUT)
    if values.merge:
        return _merge(folder, scenes, values)
    plan = _plan(values)
    shard = None if values.shard is None else Shard.parse(values.shard)
    embed_ray.check_flags(values)
    names = _names(scenes)
    path = folder / (NAME if shard is None else shard.manifest)
    lock = folder / f".{path.stem}.lock"
    with _engine(values, plan, should_stop) as engine, FolderLock(lock):
        manifest = Manifest.read(path)
        manifest.wanted += names
        _written(manifest)
        todo = list(zip(names, scenes, strict=True))
        todo = todo if shard is None else todo[shard.index :: shard.count]
        plan = plan.of(engine.encoder)

        def done(one, should_stop):
            return _done(*one, engine, manifest, plan, values, should_stop)

        failed = engine.each(done, todo, should_stop).count(False)
        shutil.rmtree(lock)
    if failed:
        print(f"{failed} of {len(todo)} scenes failed", flush=True)
    return FAILED if failed else 0


@contextlib.contextmanager
def _engine(
    values: flags.FlagValues, plan: Plan, should_stop: Callable[[], bool]
) -> Iterator[Engine]:
    """What computes: the devices of this process, or Ray's workers."""
    if values.ray is not None:
        with embed_ray.engine(
            values, load_encoder, plan, say=_say, should_stop=should_stop
        ) as found:
            yield found
        return
    dtype = dtype_of(values.precision)
    encoder = load_encoder(values.encoder, dtype=dtype, attention="auto")
    pooling = plan.of(encoder).pooling if values.unit == "chip" else None
    here = Here(Groups(encoder, pooling=pooling, batch_size=values.batch_size))
    yield Engine(encoder, lambda opening: here)


def _done(
    name: str,
    scene: str,
    engine: Engine,
    manifest: Manifest,
    plan: Plan,
    values: flags.FlagValues,
    should_stop: Callable[[], bool],
) -> bool:
    """Embed a scene and say so; False if it failed."""
    if should_stop():
        raise KeyboardInterrupt
    try:
        new = _embed(name, scene, engine, manifest, plan, values, should_stop)
    except (UserError, BadImageError) as error:
        reason = printable(str(error))
        reason = reason.removeprefix(f"{printable(dataset_name(scene))}: ")
        with contextlib.suppress(OSError):  # the reason, if the disk is full
            manifest.fail(name, reason)
        _say(f"failed: {printable(scene)}: {reason}")
        return False
    rows = manifest.scenes[name]["rows"]
    said = f"{rows} {values.unit}s" + ("" if new else ", which were there")
    file = manifest.path.parent / f"{name}{LAYOUTS[values.unit].suffix}"
    _say(f"{scene}: {file}: {said}")
    return True


def _say(line: str) -> None:
    # One write, so that the lines of threads do not mix.
    sys.stdout.write(f"{printable(line)}\n")
    sys.stdout.flush()


def _merge(folder: Path, scenes: list[str], values: flags.FlagValues) -> int:
    if scenes or values.encoder or values.shard or values.ray:
        raise UserError("--merge needs only --out: give scenes and flags without it")
    whole = merge(folder)
    for name, reason in whole.failed.items():
        print(f"failed: {printable(name)}: {reason}")
    print(printable(f"{whole.path}: {len(whole.scenes)} scenes"), flush=True)
    return FAILED if whole.failed else 0


def _plan(values: flags.FlagValues) -> Plan:
    expected = FORMATS[values.unit]
    if values.format not in (None, expected):
        raise UserError(
            f"--format={values.format} with --unit={values.unit}, expected "
            f"--format={expected}"
        )
    if values.unit == "token":
        for name in ("size", "pooling"):
            if values[name].value is not None:
                raise UserError(f"--{name} is for --unit=chip: leave it out")
        if values.dtype == "float16":
            raise UserError(
                "--dtype=float16, which GeoTIFFs lack: expected float32 or int8"
            )
    lengths = {
        name: Length.parse(values[name].value, f"--{name}")
        for name in ("chip_size", "stride")
        if values[name].value is not None
    }
    time, end = (
        (None, None) if values.datetime is None else parse_times(values.datetime)
    )
    return Plan(
        chip_size=lengths.get("chip_size"),
        stride=lengths.get("stride"),
        side=values.size,
        pooling=values.pooling,
        min_valid=values.min_valid,
        dtype=values.dtype,
        time=time,
        end=end,
        missing_bands=values.missing_bands,
        encoder=values.encoder,
    )


def _embed(name, scene, engine, manifest, plan, values, should_stop) -> bool:
    names = ("bands", "scale", "offset", "gsd", "sensor")
    options = {name: values[name].value for name in names}

    def say(line):
        _say(f"{scene}: {line}")

    with open_raster(scene, **options) as raster:
        for note in raster.notes():
            say(note)
        plan = dataclasses.replace(plan, time=plan.time or time_of(raster))
        source = printable(scene)
        opening = Opening(raster.path, options, values.unit, source, plan)
        return embed_scene(
            LAYOUTS[values.unit].of,
            engine.encoder,
            engine.compute(opening),
            raster,
            manifest,
            name=name,
            source=source,
            plan=plan,
            say=say,
            should_stop=should_stop,
        )


def _written(manifest: Manifest) -> None:
    try:
        manifest.write()
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(str(manifest.path))}: {error.strerror}; give "
            "another --out"
        ) from None


def _names(scenes: list[str]) -> list[str]:
    """The name of each scene's files; UserError if two scenes have the same."""
    found: dict[str, str] = {}
    for scene in scenes:
        name = printable(Path(scene).stem)
        if name in found:
            raise UserError(
                f"{printable(found[name])} and {printable(scene)} would be written to "
                "the same files: embed them with two commands and two --out"
            )
        found[name] = scene
    return list(found)
