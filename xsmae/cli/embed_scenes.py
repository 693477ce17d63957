"""The part of `xsmae embed` that reads scenes: its flags, and the loop over scenes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from xsmae.data.gdal import dataset_name
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError, printable
from xsmae.process.lock import FolderLock
from xsmae.scenes.chip_table import DTYPES
from xsmae.scenes.chips import Length
from xsmae.scenes.embed import Chips, Plan, embed_scene
from xsmae.scenes.encoding import Groups
from xsmae.scenes.inputs import parse_times, time_of
from xsmae.scenes.manifest import NAME, Manifest, Shard, merge
from xsmae.scenes.rows import Here
from xsmae.scenes.tokens import Patches
from xsmae.weights.encoder import Encoder, load_encoder

FAILED = 3
# What a vector is of -> the format of the files, and what they hold.
UNITS = {"chip": ("parquet", Chips), "token": ("cog", Patches)}
OUT = "embeddings"
PRECISIONS = ("auto", "float32", "bfloat16")


def define_flags(values: flags.FlagValues) -> None:
    """The flags that are for scenes only."""

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    def number(name, default, text, **bounds):
        flags.DEFINE_float(name, default, text, flag_values=values, **bounds)

    flags.DEFINE_enum(
        "unit",
        "chip",
        list(UNITS),
        "chip: a vector for each chip; token: for each patch, as a grid.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        None,
        [name for name, _ in UNITS.values()],
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


def embed_scenes(
    scenes: list[str], values: flags.FlagValues, should_stop: Callable[[], bool]
) -> int:
    """Embed all scenes; returns the exit status."""
    folder = Path(values.out or OUT)
    if values.merge:
        return _merge(folder, scenes, values)
    plan = _plan(values)
    shard = None if values.shard is None else Shard.parse(values.shard)
    names = _names(scenes)
    path = folder / (NAME if shard is None else shard.manifest)
    lock = folder / f".{path.stem}.lock"
    encoder = _encoder(values)
    plan = plan.of(encoder)
    with FolderLock(lock):
        manifest = Manifest.read(path)
        manifest.wanted += names
        _written(manifest)
        todo = list(zip(names, scenes, strict=True))
        todo = todo if shard is None else todo[shard.index :: shard.count]
        chips = values.unit == "chip"
        pooling = plan.pooling if chips else None
        groups = Groups(encoder, pooling=pooling, batch_size=values.batch_size)
        compute = Here(groups)
        failed = 0
        for name, scene in todo:
            if should_stop():
                raise KeyboardInterrupt
            try:
                new = _embed(
                    encoder, compute, scene, name, manifest, plan, values, should_stop
                )
            except (UserError, BadImageError) as error:
                failed += 1
                reason = printable(str(error))
                reason = reason.removeprefix(f"{printable(dataset_name(scene))}: ")
                with contextlib.suppress(OSError):  # the reason, if the disk is full
                    manifest.fail(name, reason)
                print(f"failed: {printable(scene)}: {reason}", flush=True)
                continue
            rows = manifest.scenes[name]["rows"]
            said = f"{rows} {values.unit}s" + ("" if new else ", which were there")
            file = folder / f"{name}{UNITS[values.unit][1].suffix}"
            print(printable(f"{scene}: {file}: {said}"), flush=True)
        shutil.rmtree(lock)
    if failed:
        print(f"{failed} of {len(todo)} scenes failed", flush=True)
    return FAILED if failed else 0


def _merge(folder: Path, scenes: list[str], values: flags.FlagValues) -> int:
    if scenes or values.encoder or values.shard:
        raise UserError("--merge needs only --out: give scenes and flags without it")
    whole = merge(folder)
    for name, reason in whole.failed.items():
        print(f"failed: {printable(name)}: {reason}")
    print(printable(f"{whole.path}: {len(whole.scenes)} scenes"), flush=True)
    return FAILED if whole.failed else 0


def _plan(values: flags.FlagValues) -> Plan:
    expected, _ = UNITS[values.unit]
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


def _encoder(values: flags.FlagValues) -> Encoder:
    precision = values.precision
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return load_encoder(values.encoder, dtype=precision, attention="auto")


def _embed(encoder, compute, scene, name, manifest, plan, values, should_stop) -> bool:
    options = {n: values[n].value for n in ("bands", "scale", "offset", "gsd")}

    def say(line):
        print(printable(f"{scene}: {line}"), flush=True)

    with open_raster(scene, **options, sensor=values.sensor) as raster:
        for note in raster.notes():
            say(note)
        return embed_scene(
            UNITS[values.unit][1].of,
            encoder,
            compute,
            raster,
            manifest,
            name=name,
            source=printable(scene),
            plan=dataclasses.replace(plan, time=plan.time or time_of(raster)),
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
