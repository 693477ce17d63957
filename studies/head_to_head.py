"""The head-to-head study: pretrains and evaluates every system in the same way.

    python -m studies.head_to_head --data=DIR

DIR contains `eurosat_rgb.zip`, `uc_merced.zip` and the published lists in `splits/`.
Finished runs are listed in studies/results/runs.jsonl and skipped. After a stop, the
same command resumes; on another machine it starts with the next run. docs/study.md has
the questions and the answers; studies/report.py writes its tables.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import xsmae
import xsmae.main
from studies import config as systems
from xsmae.config import EXECUTION_FIELDS, flatten
from xsmae.data.records import Source
from xsmae.errors import UserError
from xsmae.evaluation.rows import append_all, now, read
from xsmae.evaluation.subjects import open_encoder
from xsmae.methods import METHODS
from xsmae.process.environment import describe_environment
from xsmae.process.files import read_jsonl
from xsmae.process.signals import StopRequest

STUDIES = Path(__file__).parent
SCHEMA = 2
SEEDS = (0, 1, 2)
# The size of evaluated images: the encoders' input size is 100%, so 12.5% is one patch.
BASE_SIZE = 64
# Task -> its scales in percent.
TASKS = {
    "knn": {"scales": (12.5, 25.0, 50.0, 100.0)},
    "knn_cross_scale": {"scales": (12.5, 25.0, 50.0, 100.0)},
    "linear_probe": {"scales": (100.0,)},
}
BANK_EVERY = 4  # the bank has every 4th training image of EuroSAT, all of UC Merced
# These run with all seeds, although they are not part of the comparison: the change to
# `published` with the largest effect, and the changes to `corrected` that may improve
# it.
CONTESTED = (
    "published-temperature",
    "corrected-losses",
    "corrected-head",
    "corrected-position",
)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A labelled data set: its zip, the folder in it, its lists, its metres per pixel.

    bank_every: every n-th training image is in the bank of the evaluations.
    """

    name: str
    folder: str
    gsd: float
    bank_every: int

    def source(self, folder: Path, part: str) -> Source:
        """The images of the list `part`: `bank` or `test`."""
        config = xsmae.load_config(self.name.removesuffix("_rgb"))
        return xsmae.open_source(
            config,
            root=str(folder / self.folder),
            split=str(folder / f"{self.name}_{part}.txt"),
        )


DATA_SETS = (
    DataSet("eurosat_rgb", "eurosat_rgb", 10.0, BANK_EVERY),
    DataSet("uc_merced", "uc_merced_jpeg90", 0.3048, 1),
)


def plan(seeds: tuple[int, ...]) -> list[tuple[str, int]]:
    """(system, seed) of every run in order, complete comparisons first."""
    first, *others = seeds
    compared = [s for s in systems.SYSTEMS if "-" not in s or s in systems.STEPS]
    compared = [s for s in compared if s not in systems.LONG]
    ablated = [s for s in systems.SYSTEMS if s not in (*compared, *systems.LONG)]
    runs = [(s, seed) for seed in seeds for s in compared]
    runs += [(s, first) for s in ablated]
    runs += [(s, seed) for seed in others for s in CONTESTED]
    return runs + [(s, first) for s in systems.LONG]


def prepare(data: Path, folder: Path) -> Path:
    """Unpacks the images of `data` into `folder` once, and writes lists beside them.

    Writes `train.csv` (path, gsd of all training images), `<name>_bank.txt` and
    `<name>_test.txt`. Raises UserError if a file is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,gsd"]
    for one in DATA_SETS:
        archive = data / f"{one.name}.zip"
        lists = {p: data / f"splits/{one.name}_{p}.txt" for p in ("train", "test")}
        for path in (archive, *lists.values()):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist: give the folder with the zips and splits "
                    "with --data"
                )
        train, test = (lists[p].read_text().split() for p in ("train", "test"))
        names = [f"{one.folder}/{name}" for name in (*train, *test)]
        if not all((folder / name).exists() for name in names):
            print(f"unpacking {archive.name}", flush=True)
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        rows += [f"{one.folder}/{name},{one.gsd}" for name in train]
        for part, kept in (("bank", train[:: one.bank_every]), ("test", test)):
            (folder / f"{one.name}_{part}.txt").write_text("\n".join(kept) + "\n")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    return folder


def fields_of(system: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that determine a run, except its seed and its images."""
    config = flatten(systems.get_config(system).to_dict())
    config["changes"] = list(changes)
    return json.loads(json.dumps(config))  # a file stores tuples as lists


def is_of(run: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """True if a finished run had these fields.

    Fields added to the config since the run do not count, nor do fields of how the
    network runs.
    """
    unknown = object()
    said = {k: v for k, v in run["fields"].items() if k not in EXECUTION_FIELDS}
    return all(fields.get(k, unknown) == v for k, v in said.items())


def read_runs(path: Path) -> list[dict]:
    """The finished runs in `runs.jsonl`; [] if the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def pretrain(system: str, seed: int, folder: Path, workdir: Path, changes) -> int:
    """Pretrains a system; returns the exit status."""
    return xsmae.main.main(
        [
            "xsmae.main",
            f"--config={STUDIES / 'config.py'}:{system}",
            f"--config.data.csv_path={folder / 'train.csv'}",
            f"--config.seed={seed}",
            f"--workdir={workdir}",
            *changes,
        ]
    )


def evaluate(
    name: str,
    folder: Path,
    encoder: Path,
    should_stop: Callable[[], bool],
    tasks: Iterable[str] = tuple(TASKS),
) -> None:
    """Runs the tasks of `TASKS` on both test splits.

    The rows go to `<folder>/rows`, so that the next run finds the rows of the controls.
    Raises KeyboardInterrupt between two batches once `should_stop()` is true.
    """
    for one in DATA_SETS:
        bank, test = (one.source(folder, part) for part in ("bank", "test"))
        for task in tasks:
            xsmae.evaluate(
                encoder,
                bank,
                test,
                task=task,
                base_size=BASE_SIZE,
                results=folder / "rows" / f"{task}.jsonl",
                cache=folder / "features",
                name=name,
                data_name=one.folder,
                should_stop=should_stop,
                **TASKS[task],
            )


def kept_checkpoints(system: str, workdir: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints that show the course of a long run."""
    if system not in systems.LONG:
        return {}
    every = systems.LONG[system] // systems.PARTS_OF_LONG
    found = workdir / "checkpoints"
    return {
        step: found / str(step) for step in range(every, systems.LONG[system], every)
    }


def publish(rows: Path, results: Path, digest: str) -> None:
    """Adds the rows of an encoder and of the controls to `results`.

    It removes the paths of this machine, which mean nothing elsewhere.
    """
    published = []
    for row in read(rows):
        if row.encoder["kind"] == "encoder" and row.encoder["digest"] != digest:
            continue
        origin = dict(row.encoder["origin"])
        if "path" in origin:
            origin["path"] = Path(origin["path"]).parent.name
        run = {name: value for name, value in row.run.items() if name != "command"}
        encoder = {**row.encoder, "origin": origin}
        published.append(dataclasses.replace(row, encoder=encoder, run=run))
    append_all(results, published)


def account(
    system: str, seed: int, fields: dict, workdir: Path, seconds: float
) -> dict[str, Any]:
    """The row of `runs.jsonl` for a finished run."""
    config = json.loads((workdir / "config.json").read_text())
    rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
    method = config["method"]
    images = config["num_steps"] * config["batch_size"]
    encoder = open_encoder(str(workdir / "encoder"), config=None)
    found = describe_environment()
    kept = {
        str(step): open_encoder(str(path), config=None).digest
        for step, path in kept_checkpoints(system, workdir).items()
    }
    return {
        **({"checkpoints": kept} if kept else {}),
        "schema": SCHEMA,
        "system": system,
        "seed": seed,
        "fields": fields,
        "encoder": encoder.digest,
        "method": method,
        "steps": config["num_steps"],
        "batch_size": config["batch_size"],
        "images": images,
        "views": images * METHODS[method].num_views,
        "first": {k: v for k, v in rows[0].items() if k.startswith("loss")},
        "last": {k: v for k, v in rows[-1].items() if k.startswith("loss")},
        # Time of the last process only, if the run was stopped and resumed.
        "seconds": round(seconds),
        "time": now(),
        **{k: found[k] for k in ("python", "versions", "devices", "git_revision")},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs everything that is not finished; returns the exit status."""
    values = flags.FlagValues()
    string = lambda *a: flags.DEFINE_string(*a, flag_values=values)  # noqa: E731
    string("data", None, "The folder with the zips and splits.")
    string("folder", ".cache/head_to_head", "The folder for images, features and runs.")
    string("results", str(STUDIES / "results"), "The folder for the rows.")
    flags.DEFINE_list(
        "only", [], "SYSTEM or SYSTEM/SEED; default: all.", flag_values=values
    )
    flags.DEFINE_list("seeds", [*map(str, SEEDS)], "The seeds.", flag_values=values)
    flags.DEFINE_multi_string(
        "change", [], "An extra flag for every pretraining.", flag_values=values
    )
    try:
        values(sys.argv if argv is None else argv)
        if values.data is None:
            raise UserError(
                "--data=DIR is missing: give the folder with the zips and splits"
            )
        runs = plan(tuple(map(int, values.seeds)))
        known = {name for s, seed in runs for name in (s, f"{s}/{seed}")}
        unknown = set(values.only) - known
        if unknown:
            raise UserError(
                f"--only={', '.join(unknown)}, expected some of {sorted(known)}"
            )
        return _run_all(values, runs)
    except (UserError, flags.Error, ValueError) as error:
        print(f"head_to_head: {error}", file=sys.stderr)
        return 2


def _run_all(values: flags.FlagValues, runs: list[tuple[str, int]]) -> int:
    results, changes = Path(values.results), values.change
    folder = prepare(Path(values.data), Path(values.folder).absolute())
    results.mkdir(parents=True, exist_ok=True)
    for system, seed in runs:
        if values.only and not {system, f"{system}/{seed}"} & set(values.only):
            continue
        name, fields = f"{system}/{seed}", fields_of(system, changes)
        done = read_runs(results / "runs.jsonl")
        same = [r for r in done if (r["system"], r["seed"]) == (system, seed)]
        if any(is_of(run, fields) for run in same):
            print(f"{name}: finished, see {results / 'runs.jsonl'}", flush=True)
            continue
        print(f"== {name}", flush=True)
        digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        workdir = folder / "runs" / f"{system}-{seed}-{digest[:6]}"
        start = time.monotonic()
        status = pretrain(system, seed, folder, workdir, changes)
        seconds = time.monotonic() - start
        if status:
            return status
        with StopRequest() as stop:
            should_stop = lambda stop=stop: stop.signal is not None  # noqa: E731
            try:
                evaluate(name, folder, workdir / "encoder", should_stop)
                for step, path in kept_checkpoints(system, workdir).items():
                    evaluate(f"{name}@{step}", folder, path, should_stop, ["knn"])
            except KeyboardInterrupt:
                return 128 + (stop.signal or 2)
        row = account(system, seed, fields, workdir, seconds)
        for task in TASKS:
            file = f"{task}.jsonl"
            for digest in (row["encoder"], *row.get("checkpoints", {}).values()):
                publish(folder / "rows" / file, results / file, digest)
        with (results / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
