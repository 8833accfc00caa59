"""The teachers that label, as Ray actors: the current one, the next one loading, the first one.

A teacher is taken up without stopping: its actor loads beside the current one, and takes over
when it is ready. What a teacher says of a micro-batch is asked for before the student predicts
and learns, and fetched when it is needed, so that the two work at the same time.
"""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from ray_jobs.labels import Labels, aligned, label
from ray_jobs.microbatch import MicroBatch
from ray_jobs.recipes import DistillConfig
from services.core.catalog import Catalog
from services.core.errors import NothingServingError, RegistryError
from services.core.metrics import Ranks
from services.core.models.teacher import Teacher
from services.core.registry import Registry

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # for a newly promoted teacher
READY_TIMEOUT_S = 120.0


class Labeller:
    """One teacher version, aligned to the job's catalog. Runs in a process of its own."""

    def __init__(self, registry_uri: str, version: int, *, threads: int) -> None:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as scratch:
            directory = Registry(registry_uri).fetch("teacher", version, Path(scratch))
            self._teacher = Teacher.load(directory)
            self._own = Catalog.from_table(pq.read_table(directory / "catalog.parquet"))
        self._aligned = self._teacher

    def align(self, item_ids: Sequence[str], content: NDArray[np.int32]) -> None:
        """Take over the job's catalog; calls of one caller are served in order."""
        self._aligned = aligned(self._teacher, self._own, item_ids=item_ids, content=content)

    def label(self, batch: MicroBatch, **how: Any) -> Labels:
        return label(self._aligned, batch, **how)


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers on their way."""

    teacher: "ray.ObjectRef[Labels] | None" = None
    stale: "ray.ObjectRef[Labels] | None" = None
    same: bool = False  # the first teacher is still the current one


class Teachers:
    """One worker's labellers. `version` and `first` are None until there is a teacher."""

    def __init__(
        self,
        registry_uri: str,
        *,
        config: DistillConfig,
        first: int | None = None,
    ) -> None:
        self._registry = Registry(registry_uri)
        self._config = config
        self._actors: dict[int, Any] = {}
        self._align: tuple[list[str], NDArray[np.int32]] = ([], np.zeros((1, 0), np.int32))
        self._next: tuple[int, Any] | None = None  # version, its readiness
        self._looked_s = 0.0
        self.version: int | None = None
        self.first = first
        self.offsets: Mapping[int, int] = {}

    def align(self, catalog: Catalog) -> None:
        """Tell every labeller about new rows and content."""
        rows = range(1, len(catalog))
        self._align = (catalog.ids(rows), catalog.content.copy())
        for actor in self._actors.values():
            actor.align.remote(*self._align)

    def start(self) -> None:
        """Begin with the teacher that is promoted now, if there is one; wait until it is ready."""
        self._resume_first()
        self._look()
        if self._next is not None:
            ray.wait([self._next[1]], timeout=READY_TIMEOUT_S)
        self.look()

    def look(self) -> bool:
        """Every second see whether another teacher was promoted; True when it has taken over."""
        if self._next is None and time.monotonic() - self._looked_s > LOOK_EVERY_S:
            self._look()
        if self._next is None:
            return False
        version, ready = self._next
        if not ray.wait([ready], timeout=0)[0]:
            return False
        self._next = None
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            logger.warning("teacher %d can't label, the one before goes on: %s", version, error)
            self._actors.pop(version, None)
            return False
        gone = self.version
        self.version = version
        self.first = self.first or version
        self.offsets = _offsets(self._registry, version)
        if gone is not None and gone not in (self.first, version):
            self._actors.pop(gone, None)
        logger.info("teacher %d labels from now on", version)
        return True

    def ask_labels(self, batch: MicroBatch) -> Asked:
        """Ask for labels alone, of what need not be scored."""
        actor = self._actors.get(self.version or 0)
        if actor is None or not self._config.needs_labels:
            return Asked()
        return Asked(actor.label.remote(batch, top_k=self._config.top_k))

    def ask(self, batch: MicroBatch, *, stale: bool, **how: Any) -> Asked:
        """Ask for labels of a batch; `stale`: for the first teacher's ranks as well."""
        actor = self._actors.get(self.version or 0)
        if actor is None:
            return Asked()
        ref = ray.put(batch)  # once, for both
        how = {**how, "top_k": self._config.top_k}
        answer = actor.label.remote(ref, **how)
        if not stale or not self._config.stale_teacher:
            return Asked(answer)
        if self.first == self.version:
            return Asked(answer, same=True)
        first = self._actors.get(self.first or 0)
        return Asked(answer, None if first is None else first.label.remote(ref, **how))

    def answer(self, asked: Asked) -> tuple[Labels | None, Ranks | None]:
        """Labels, and the first teacher's ranks. A labeller that died is started again."""
        labels = self._get(asked.teacher, self.version)
        if asked.same:
            return labels, None if labels is None else labels.ranks
        stale = self._get(asked.stale, self.first)
        return labels, None if stale is None else stale.ranks

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        try:
            promoted = self._registry.serving("teacher").version
        except NothingServingError:
            return
        if promoted != self.version or promoted not in self._actors:
            self._next = (promoted, self._load(promoted))

    def _resume_first(self) -> None:
        if self.first is None or not self._config.stale_teacher:
            return
        try:
            self._registry.manifest("teacher", self.first)
        except RegistryError as error:
            logger.warning("the first teacher is gone, its row ends here: %s", error)
            return
        self._load(self.first)

    def _load(self, version: int) -> "ray.ObjectRef[None]":
        """Start a labeller (unless it runs); the reference resolves when it is ready."""
        if version not in self._actors:
            # Without the strategy it would have to fit into the training worker's own bundle.
            self._actors[version] = (
                ray.remote(Labeller)
                .options(num_cpus=self._config.cpus_per_worker, scheduling_strategy="DEFAULT")
                .remote(self._registry.uri, version, threads=self._config.threads_per_worker)
            )
        ready: ray.ObjectRef[None] = self._actors[version].align.remote(*self._align)
        return ready

    def _get(self, asked: "ray.ObjectRef[Labels] | None", version: int | None) -> Labels | None:
        if asked is None or version is None:
            return None
        try:
            labels: Labels = ray.get(asked)
            return labels
        except ray.exceptions.RayActorError as error:
            logger.warning("teacher %d stopped labelling, starting it again: %s", version, error)
            self._actors.pop(version, None)
            self._load(version)
            return None


def _offsets(registry: Registry, version: int) -> dict[int, int]:
    """How far into the log a teacher was trained."""
    offsets = registry.manifest("teacher", version).get("offsets", {})
    return {int(partition): int(offset) for partition, offset in offsets.items()}
