"""The model that answers, replaced while it does: notice, fetch, verify, build, warm, swap."""

import json
import logging
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyarrow.parquet as pq

from services.core import wire
from services.core.catalog import Catalog
from services.core.errors import NothingServingError
from services.core.models.sizes import StudentConfig
from services.core.models.student import Student
from services.core.registry import MANIFEST, Registry, Serving
from services.recommend.engine import Model, rank
from services.recommend.fetched import Fetched
from services.recommend.items import COLUMNS, Items
from services.recommend.nearest import Nearest
from services.recommend.polling import Attempts, Polling
from services.recommend.schema import RecommendRequest
from services.recommend.telemetry import Telemetry

CATALOG: Final = "catalog.parquet"

log = logging.getLogger(__name__)


class LiveModel:
    """`model` is the last good version; a thread of its own keeps it up to date.

    Whatever goes wrong with a new version or the registry, the last good one stays, and the log
    and `reflux_model_swaps_failed` say why.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        poll_s: float,
        telemetry: Telemetry,
        exact_items: int,
        shared: Path | None = None,
    ) -> None:
        """`shared`: see `Fetched`."""
        self.model: Model | None = None
        self._registry = registry
        self._fetched, self._share = Fetched(registry, shared), shared is not None
        self._exact_items = exact_items
        self._telemetry = telemetry
        self._attempts = Attempts()
        self._complaint = ""
        # On return from `start`, what serves already is there.
        polling = Polling(self.look, poll_s=poll_s, name="live-model")
        self.start, self.stop = polling.start, polling.stop

    def look(self) -> None:
        """Take over the version that the registry wants served, if it is another one."""
        try:
            serving = self._registry.serving("student")
            if self.model is not None and serving.version == self.model.version:
                return
            if not self._attempts.begin(serving):
                return
            self._take_or_an_earlier(serving)
            self._attempts.succeed()
            self._complaint = ""
        except NothingServingError as error:
            self._complain(str(error))
        except Exception as error:  # whatever a broken artifact or file system comes up with
            self._telemetry.swaps_failed.labels(type(error).__name__).inc()
            self._complain(f"{type(error).__name__}: {error}")

    def _take_or_an_earlier(self, serving: Serving) -> None:
        """A replica that has nothing yet makes do with what served before, and goes on trying."""
        try:
            self._take(serving.version)
        except Exception:
            earlier = [entry.version for entry in reversed(serving.history[:-1])]
            for version in dict.fromkeys(earlier) if self.model is None else ():
                with suppress(Exception):
                    self._take(version)
                    break
            raise

    def _take(self, version: int) -> None:
        with self._fetched.version(version) as directory:
            model = load(directory, self.model, exact_items=self._exact_items, share=self._share)
        warm_up(model)
        self.model = model  # the swap
        now_ms = time.time_ns() // 1_000_000
        for arrival_ms in model.arrivals_ms:
            self._telemetry.weight_freshness_seconds.observe((now_ms - arrival_ms) / 1000)
        self._telemetry.swaps.inc()
        self._telemetry.model_version.set(version)
        log.info("student %d answers now", version)

    def _complain(self, complaint: str) -> None:
        """Log it once, not at every look."""
        if complaint != self._complaint:
            kept = f"student {self.model.version} stays" if self.model else "nothing answers yet"
            log.warning("%s; %s", complaint, kept)
            self._complaint = complaint


def load(
    directory: Path,
    previous: Model | None = None,
    *,
    exact_items: int,
    share: bool = False,
) -> Model:
    """The model in a directory that `Registry.fetch` gave; what it has in common with the
    `previous` one is taken over. Above `exact_items` it is searched approximately; `share`: see
    `Student.load_for_serving`."""
    manifest = json.loads((directory / MANIFEST).read_text())
    table = pq.read_table(directory / CATALOG, columns=COLUMNS, use_threads=False)
    student = Student.load_for_serving(directory, share=share)
    items = Items.of(table, previous.catalog if previous else None)
    big = len(items) > exact_items
    return Model(
        version=manifest["version"],
        teacher_version=manifest.get("teacher_version"),
        arrivals_ms=tuple((manifest.get("arrivals_ms") or {}).values()),
        student=student,
        catalog=items,
        nearest=Nearest.build(student, items.popularity) if big else None,
    )


def load_apart(registry: Registry, version: int, *, exact_items: int) -> Model:
    """A version of the registry's, for whoever doesn't follow what serves."""
    with tempfile.TemporaryDirectory(prefix="reflux-model-") as aside:
        return load(registry.fetch("student", version, Path(aside)), exact_items=exact_items)


def rehearse() -> None:
    """Have what answers run compiled before there is a model: ten seconds, once on a machine."""
    for read in (wire.strings, wire.integers, wire.doubles):
        read(b"")
    catalog = Catalog()
    catalog.add(["item"])
    config = StudentConfig(dim=2, n_layers=1, n_heads=1, max_len=2, n_recent=1, teacher_dim=1)
    student = Student(config, n_rows=len(catalog)).for_serving()
    items = Items.of(catalog.to_table())
    made = Model(version=0, teacher_version=None, arrivals_ms=(), student=student, catalog=items)
    warm_up(made)


def warm_up(model: Model) -> None:
    """A first answer, at nobody's cost; ValueError for a model that can't give one."""
    known = model.catalog.ids([1]) if len(model.catalog) > 1 else []
    request = RecommendRequest(recent_items=known, include_seen=True)
    _ = model.catalog.kinds  # counted once, here, not under the first answer
    if known and not rank(model, request, None, now_ms=0).rows:
        raise ValueError(f"student {model.version} scores no item with a finite number")
