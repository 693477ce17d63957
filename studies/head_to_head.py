"""The head-to-head: pretrain every system alike, evaluate all, one after the other.

    python -m studies.head_to_head --data=DIR

DIR holds `eurosat_rgb.zip`, `uc_merced.zip` and the published lists in `splits/`. What
is finished stands in studies/results/runs.jsonl and is skipped; the same command goes
on after any stop, on another machine from the next run. docs/study.md says what is
asked and answered, studies/report.py writes its tables.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
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
from xsmae.process.environment import describe_environment
from xsmae.process.files import read_jsonl
from xsmae.process.signals import StopRequest

STUDIES = Path(__file__).parent
SCHEMA = 2
SEEDS = (0, 1, 2)
# What is evaluated: the encoders' own input size is 100 %, so that 12.5 % is one patch.
BASE_SIZE = 64
# Task -> its scales in percent, and its options where they are not the default.
TASKS = {
    "knn": {"scales": (12.5, 25.0, 50.0, 100.0)},
    "linear_probe": {"scales": (100.0,)},
}
BANK_EVERY = 4  # of EuroSAT's training images, the bank's; all of UC Merced's
# Run with all seeds though they are not compared: the change of `published` that does
# more than all others together, and what of `corrected` most suggests that it were
# better without.
CONTESTED = (
    "published-temperature",
    "corrected-losses",
    "corrected-head",
    "corrected-position",
)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A labelled data set: its zip, the folder in it, its lists, its metres per pixel.

    bank_every: of the training images every n-th is in the bank of the evaluations.
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
    """(system, seed) of every run, in order: whole comparisons first."""
    compared = [s for s in systems.SYSTEMS if "-" not in s]
    ablated = [s for s in systems.SYSTEMS if "-" in s]
    first, *others = seeds
    runs = [(s, seed) for seed in seeds for s in compared]
    runs += [(s, first) for s in ablated]
    return runs + [(s, seed) for seed in others for s in CONTESTED]


def prepare(data: Path, folder: Path) -> Path:
    """Unpack the images of `data` into `folder`, once; the lists beside them.

    Writes `train.csv` (path, gsd of all training images), and `<name>_bank.txt` and
    `<name>_test.txt`. Raises UserError where something is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,gsd"]
    for one in DATA_SETS:
        archive = data / f"{one.name}.zip"
        lists = {p: data / f"splits/{one.name}_{p}.txt" for p in ("train", "test")}
        for path in (archive, *lists.values()):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist: give the folder of the zips and their "
                    "splits with --data"
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
    """What decides a run but for its seed and its images, field by field."""
    config = flatten(systems.get_config(system).to_dict())
    config["changes"] = list(changes)
    return json.loads(json.dumps(config))  # tuples are lists in a file


def is_of(run: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether a finished run had these fields.

    A field that the config has got since was not there to be set: it says nothing. Nor
    does how the network was run.
    """
    unknown = object()
    said = {k: v for k, v in run["fields"].items() if k not in EXECUTION_FIELDS}
    return all(fields.get(k, unknown) == v for k, v in said.items())


def read_runs(path: Path) -> list[dict]:
    """The finished runs of `runs.jsonl`; [] where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def pretrain(system: str, seed: int, folder: Path, workdir: Path, changes) -> int:
    """The run itself; returns its exit status."""
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
    name: str, folder: Path, workdir: Path, should_stop: Callable[[], bool]
) -> None:
    """kNN over the scales and the linear probe at 100 %, on both test splits.

    The rows go to `<folder>/rows`, where the next run finds those of the controls.
    Raises KeyboardInterrupt between two batches once `should_stop()`.
    """
    for one in DATA_SETS:
        bank, test = (one.source(folder, part) for part in ("bank", "test"))
        for task, options in TASKS.items():
            xsmae.evaluate(
                workdir / "encoder",
                bank,
                test,
                task=task,
                base_size=BASE_SIZE,
                results=folder / "rows" / f"{task}.jsonl",
                cache=folder / "features",
                name=name,
                data_name=one.folder,
                should_stop=should_stop,
                **options,
            )


def publish(rows: Path, results: Path, digest: str) -> None:
    """Add the rows of an encoder and of the controls to `results`.

    Without the paths of the machine that made them, which say nothing elsewhere.
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
    """What `runs.jsonl` says of a finished run."""
    config = json.loads((workdir / "config.json").read_text())
    rows = [r for r in read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
    method = config["method"]
    images = config["num_steps"] * config["batch_size"]
    encoder = open_encoder(str(workdir / "encoder"), config=None)
    found = describe_environment()
    return {
        "schema": SCHEMA,
        "system": system,
        "seed": seed,
        "fields": fields,
        "encoder": encoder.digest,
        "method": method,
        "steps": config["num_steps"],
        "batch_size": config["batch_size"],
        "images": images,
        "views": images * (2 if method == "cross_scale_mae" else 1),
        "first": {k: v for k, v in rows[0].items() if k.startswith("loss")},
        "last": {k: v for k, v in rows[-1].items() if k.startswith("loss")},
        # Of the process that finished it; less than the whole where it was stopped.
        "seconds": round(seconds),
        "time": now(),
        **{k: found[k] for k in ("python", "versions", "devices", "git_revision")},
    }


def main(argv: list[str] | None = None) -> int:
    """Run what is not finished; returns the exit status."""
    values = flags.FlagValues()
    string = lambda *a: flags.DEFINE_string(*a, flag_values=values)  # noqa: E731
    string("data", None, "The folder of the zips and splits.")
    string("folder", ".cache/head_to_head", "Where images, features and runs go.")
    string("results", str(STUDIES / "results"), "Where the rows go.")
    flags.DEFINE_list(
        "only", [], "SYSTEM or SYSTEM/SEED; default: all.", flag_values=values
    )
    flags.DEFINE_list("seeds", [*map(str, SEEDS)], "The seeds.", flag_values=values)
    flags.DEFINE_multi_string(
        "change", [], "A flag for every pretraining, for a trial.", flag_values=values
    )
    try:
        values(sys.argv if argv is None else argv)
        if values.data is None:
            raise UserError("--data=DIR is missing: the folder of the zips and splits")
        runs = plan(tuple(map(int, values.seeds)))
        known = {name for s, seed in runs for name in (s, f"{s}/{seed}")}
        unknown = set(values.only) - known
        if unknown:
            raise UserError(f"--only={', '.join(unknown)}, expected of {sorted(known)}")
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
            try:
                evaluate(name, folder, workdir, lambda: stop.signal is not None)
            except KeyboardInterrupt:
                return 128 + (stop.signal or 2)
        row = account(system, seed, fields, workdir, seconds)
        for task in TASKS:
            file = f"{task}.jsonl"
            publish(folder / "rows" / file, results / file, row["encoder"])
        with (results / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
