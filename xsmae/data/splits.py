"""The published split into training and test records.

`split="train"` and `split="test"` are the same on every machine and never change.
Within each class, the ids are sorted by the SHA-256 of their UTF-8 bytes (as
hexadecimal text). The first `round(test_fraction * n)` of n ids are the test split
(Python's round: halves to even). Without labels, all records are one class. EuroSAT at
0.2: 21,600 / 5,400; RESISC45 at 0.2: 25,200 / 6,300; UC Merced at 0.1: 1,890 / 210.

`split` may also be the path of a text file with one id per line. Labels and class names
are numbered before the split, so they are the same in every split.
"""

import collections
import pathlib
from collections.abc import Sequence

import numpy as np

from xsmae.data.records import sha256_of_text
from xsmae.errors import UserError


def split_indices(
    ids: Sequence[str],
    labels: np.ndarray | None,
    split: str,
    test_fraction: float,
) -> np.ndarray:
    """Chooses the records of a split by the published rule (see the module).

    Args:
      ids: one per record.
      labels: int [len(ids)] or None.
      split: "all", "train", "test", or the path of a text file with one id per line.
      test_fraction: between 0 and 1, for "train" and "test".

    Returns:
      int64 [n], ascending.

    Raises:
      UserError: no such split or file, unknown or repeated ids, an empty split.
    """
    if split == "all":
        return np.arange(len(ids))
    if split not in ("train", "test"):
        return _listed(ids, split)
    if not 0 < test_fraction < 1:
        raise UserError(
            f"test_fraction is {test_fraction}, expected a number between 0 and 1"
        )
    members = collections.defaultdict(list)
    for index in range(len(ids)):
        members[None if labels is None else int(labels[index])].append(index)
    is_test = np.zeros(len(ids), bool)
    for indices in members.values():
        # The index breaks ties between equal ids.
        indices.sort(key=lambda index: (sha256_of_text(ids[index]), index))
        is_test[indices[: round(test_fraction * len(indices))]] = True
    chosen = np.flatnonzero(is_test if split == "test" else ~is_test)
    if not len(chosen):
        raise UserError(
            f"split={split!r} is empty: test_fraction={test_fraction} of {len(ids)} "
            f"images in {len(members)} classes; change test_fraction"
        )
    return chosen


def _listed(ids: Sequence[str], path: str) -> np.ndarray:
    try:
        lines = pathlib.Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"split={path!r}, expected 'all', 'train', 'test' or a text file of ids, "
            f"which cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    wanted = [line.strip() for line in lines if line.strip()]
    if not wanted:
        raise UserError(f"the split list {path} is empty; write one id per line")
    repeated = len(wanted) - len(set(wanted))
    if repeated:
        first = collections.Counter(wanted).most_common(1)[0][0]
        raise UserError(
            f"the split list {path} repeats {repeated} ids, e.g. {first!r}; list each "
            "id once"
        )
    index_of = {name: index for index, name in enumerate(ids)}
    unknown = [name for name in wanted if name not in index_of]
    if unknown:
        raise UserError(
            f"the split list {path} has {len(unknown)} of {len(wanted)} ids that are "
            f"not in the data, the first is {unknown[0]!r}; expected ids like "
            f"{ids[0]!r}"
        )
    return np.array(sorted(index_of[name] for name in wanted))
