"""What computes rows of scenes on a node of a Ray cluster.

A worker loads the encoder once. It opens scenes itself, so each node must see them and
the encoder under the same names.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import socket
import threading
from typing import TYPE_CHECKING, Any

import xsmae
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError, UserError, printable
from xsmae.scenes.embed import Chips, Plan, job_of
from xsmae.scenes.encoding import Groups, dtype_of
from xsmae.scenes.rows import Layout, encoded
from xsmae.scenes.tokens import Patches
from xsmae.weights.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    from xsmae.scenes.rows import Stored

LAYOUTS = {layout.unit: layout for layout in (Chips, Patches)}
OPEN = 4  # scenes that a worker keeps open


@dataclasses.dataclass(frozen=True)
class Facts:
    """What must be the same on all workers, except `host` and `device`.

    group: chips of a group. dtype, digest: of the encoder. software: versions.
    """

    host: str
    device: str
    group: int
    dtype: str
    digest: str
    software: str


@dataclasses.dataclass(frozen=True)
class Opening:
    """How to open a scene: `open_raster(path, **options)`.

    unit: `chip` or `token`. source: as the user calls it. plan: from `Plan.of`.
    """

    path: str
    options: dict[str, Any]
    unit: str
    source: str
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Work:
    """Some rows of a scene.

    job: of the scene, as the command sees it. step: see `Layout`. rows: see `encoded`.
    """

    opening: Opening
    job: str
    step: int
    rows: range


class Worker:
    """Computes rows of scenes; several threads may call it.

    path: of the encoder. precision: see `dtype_of`. pooling, batch_size: see `Groups`.
    """

    def __init__(self, path: str, precision: str, pooling: str | None, batch_size: int):
        self._path, self._precision = path, precision
        self._options = {"pooling": pooling, "batch_size": batch_size}
        self._lock = threading.Lock()
        self._loaded: tuple[Encoder, Groups] | None = None
        self._open: dict[str, Layout] = {}  # by job, the last used last
        self._host = socket.gethostname()

    def facts(self) -> Facts:
        """Load the encoder; UserError if it cannot be loaded on this node."""
        encoder, groups = self._encoder()
        jaxes = [f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib")]
        return Facts(
            self._host,
            groups.devices[0].device_kind,
            groups.size,
            encoder.dtype,
            encoder.digest,
            ", ".join([f"xsmae {xsmae.__version__}", *jaxes]),
        )

    def stored(self, work: Work) -> list[tuple[range, Stored]]:
        """The rows as `Strips` keeps them.

        Raises UserError and BadImageError as in one process. If only this node cannot
        open the scene, or finds another one, the message names the node.
        """
        groups = self._encoder()[1]
        layout = self._layout(work)
        return [
            (rows.rows, layout.stored(rows))
            for rows in encoded(layout, groups, rows=work.rows)
        ]

    def _encoder(self) -> tuple[Encoder, Groups]:
        with self._lock:
            if self._loaded is None:
                dtype = dtype_of(self._precision)
                encoder = load_encoder(self._path, dtype=dtype, attention="auto")
                self._loaded = encoder, Groups(encoder, **self._options)
            return self._loaded

    def _layout(self, work: Work) -> Layout:
        """The scene, opened here; it must be the one that the command has opened."""
        encoder = self._encoder()[0]
        with self._lock:
            layout = self._open.pop(work.job, None) or self._opened(encoder, work)
            self._open[work.job] = layout
            if len(self._open) > OPEN:
                oldest = self._open.pop(next(iter(self._open)))
                oldest.reader.raster.close()
        return layout

    def _opened(self, encoder: Encoder, work: Work) -> Layout:
        opening, where = work.opening, f"on the node {printable(self._host)}"
        try:
            raster = open_raster(opening.path, **opening.options)
            layout = LAYOUTS[opening.unit].of(encoder, raster, opening.plan)
        except (UserError, BadImageError) as error:
            raise type(error)(f"{error} ({where})") from None
        if job_of(layout, encoder, opening.plan, opening.source) != work.job:
            raise UserError(
                f"{printable(opening.path)} is another file {where} (other size, time "
                "of change or georeference): give a path that all nodes share"
            )
        return dataclasses.replace(layout, step=work.step)
