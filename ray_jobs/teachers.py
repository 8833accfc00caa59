"""The teachers that label, as Ray actors: the current one, the next one loading, the first one.

A teacher is taken up without stopping: its actor loads beside the current one, and takes over
when it is ready. What a teacher says of a micro-batch is asked for before the student predicts
and learns, and fetched when it is needed, so that the two work at the same time.
"""

import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from ray_jobs.labels import Items, Labels, aligned, items_of, label
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
    """One teacher version, aligned to the job's catalog. Runs in a process of its own.

    `width`: what the student's projection takes for the teacher's hidden state.
    """

    def __init__(
        self,
        registry_uri: str,
        version: int,
        *,
        width: int,
        threads: int,
        niceness: int,
        device: str,
    ) -> None:
        os.nice(niceness)
        torch.set_num_threads(threads)
        self._device = device
        with tempfile.TemporaryDirectory() as scratch:
            directory = Registry(registry_uri).fetch("teacher", version, Path(scratch))
            self._teacher = Teacher.load(directory)
            self._own = Catalog.from_table(pq.read_table(directory / "catalog.parquet"))
        self._aligned = self._teacher
        if self._teacher.config.dim != width:
            raise ValueError(
                f"teacher {version} is {self._teacher.config.dim} wide, the student learns from "
                f"one of {width}; train the teacher and the student with the same recipe"
            )

    def align(self, item_ids: Sequence[str], content: NDArray[np.int32]) -> None:
        """Take over the job's catalog; calls of one caller are served in order."""
        moved = aligned(self._teacher, self._own, item_ids=item_ids, content=content)
        self._aligned = moved.to(self._device)

    def items(self) -> Items:
        return items_of(self._aligned)

    def label(self, batch: MicroBatch, **how: Any) -> Labels:
        return label(self._aligned, batch, **how)


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers on their way, and who gives them."""

    teacher: "ray.ObjectRef[Labels] | None" = None
    stale: "ray.ObjectRef[Labels] | None" = None
    version: int | None = None  # the current teacher's, when it was asked
    same: bool = False  # it was the first one


class Teaching(Protocol):
    """What the job needs of teachers; an evaluation brings ones that need no actors."""

    version: int | None
    first: int | None
    offsets: Mapping[int, int]

    def align(self, catalog: Catalog) -> None: ...
    def look(self) -> None: ...
    def items(self) -> Items | None: ...
    def ask_labels(self, batch: MicroBatch) -> Asked: ...
    def ask(self, batch: MicroBatch, *, stale: bool, **how: Any) -> Asked: ...
    def answer(self, asked: Asked) -> tuple[Labels | None, Ranks | None]: ...


class Teachers:
    """One worker's labellers. `version` labels, `first` is kept to show what ageing costs; both
    are None until there is a teacher."""

    def __init__(
        self,
        registry_uri: str,
        *,
        config: DistillConfig,
        width: int,
        first: int | None = None,
    ) -> None:
        self._registry = Registry(registry_uri)
        self._config = config
        self._width = width
        self._running: dict[int, _Running] = {}
        self._failed: set[int] = set()
        self._catalog: tuple[list[str], NDArray[np.int32]] = ([], np.zeros((1, 0), np.int32))
        self._wanted: int | None = None
        self._looked_s = -LOOK_EVERY_S
        self.version: int | None = None
        self.first = first
        self.offsets: Mapping[int, int] = {}

    def align(self, catalog: Catalog) -> None:
        """Tell every labeller about new rows and content."""
        self._catalog = (catalog.ids(range(1, len(catalog))), catalog.content.copy())
        for running in self._running.values():
            running.actor.align.remote(*self._catalog)

    def start(self) -> None:
        """Take up the teacher that is promoted now, if there is one; wait until it is ready."""
        if self.first is not None and self._config.stale_teacher:
            try:
                self._registry.manifest("teacher", self.first)
                self._load(self.first)
            except RegistryError as error:
                logger.warning("the first teacher is gone, its row ends here: %s", error)
        self.look()
        if self._wanted is not None:
            ray.wait([self._running[self._wanted].ready], timeout=READY_TIMEOUT_S)
        self.look()

    def look(self) -> None:
        """See, once a second, whether another teacher was promoted; swap when it is ready."""
        if self._wanted == self.version and time.monotonic() - self._looked_s > LOOK_EVERY_S:
            self._looked_s = time.monotonic()
            try:
                promoted = self._registry.serving("teacher").version
            except NothingServingError:
                return
            if promoted not in self._failed:
                self._wanted = promoted
                self._load(promoted)
        if self._wanted is None or self._wanted == self.version or not self._able(self._wanted):
            return
        gone, self.version = self.version, self._wanted
        self.first = self.first or self.version
        self.offsets = _offsets(self._registry, self.version)
        if gone is not None and gone != self.first:
            self._running.pop(gone, None)  # the actor ends with its last reference
        logger.info("teacher %d labels from now on", self.version)

    def items(self) -> Items | None:
        """The current teacher's view of the items; None where there is no teacher."""
        actor = self._able(self.version)
        if actor is None:
            return None
        items: Items = ray.get(actor.items.remote())
        return items

    def ask_labels(self, batch: MicroBatch) -> Asked:
        """Ask for labels alone, of what need not be scored."""
        actor = self._able(self.version)
        if actor is None or not self._config.needs_labels:
            return Asked()
        return Asked(actor.label.remote(batch, top_k=self._config.top_k), version=self.version)

    def ask(self, batch: MicroBatch, *, stale: bool, **how: Any) -> Asked:
        """Ask for labels of a batch; `stale`: for the first teacher's ranks as well."""
        actor = self._able(self.version)
        if actor is None:
            return Asked()
        ref = ray.put(batch)  # once, for both
        how = {**how, "top_k": self._config.top_k}
        answer = actor.label.remote(ref, **how)
        if not stale or not self._config.stale_teacher:
            return Asked(answer, version=self.version)
        if self.first == self.version:
            return Asked(answer, version=self.version, same=True)
        first = self._able(self.first)
        stale_answer = None if first is None else first.label.remote(ref, **how)
        return Asked(answer, stale_answer, version=self.version)

    def answer(self, asked: Asked) -> tuple[Labels | None, Ranks | None]:
        """Labels, and the first teacher's ranks; None where nobody was asked, or has died."""
        labels = self._get(asked.teacher, asked.version)
        if asked.same:
            return labels, None if labels is None else labels.ranks
        stale = self._get(asked.stale, self.first)
        return labels, None if stale is None else stale.ranks

    def _load(self, version: int) -> None:
        """Start a labeller, unless it runs."""
        if version in self._running:
            return
        # Without the strategy it would have to fit into the training worker's own bundle.
        actor = (
            ray.remote(Labeller)
            .options(
                num_cpus=self._config.label_cpus,
                num_gpus=self._config.label_gpus,
                scheduling_strategy="DEFAULT",
            )
            .remote(
                self._registry.uri,
                version,
                width=self._width,
                threads=self._config.threads_per_worker,
                niceness=self._config.niceness,
                device="cuda" if self._config.label_gpus else "cpu",
            )
        )
        self._running[version] = _Running(actor, actor.align.remote(*self._catalog))

    def _able(self, version: int | None) -> Any | None:
        """The labeller of that version, if it is ready: one that isn't would keep us waiting."""
        running = self._running.get(version or 0)
        if running is None or not ray.wait([running.ready], timeout=0)[0]:
            return None
        try:
            ray.get(running.ready)
        except ray.exceptions.RayError as error:
            logger.warning("teacher %s can't label: %s", version, error)
            self._failed.add(version or 0)
            self._running.pop(version or 0)
            self._wanted = self.version
            return None
        return running.actor

    def _get(self, asked: "ray.ObjectRef[Labels] | None", version: int | None) -> Labels | None:
        if asked is None:
            return None
        try:
            labels: Labels = ray.get(asked)
            return labels
        except ray.exceptions.RayActorError as error:
            logger.warning("teacher %s stopped labelling, starting it again: %s", version, error)
            if version in self._running:
                del self._running[version]
                self._load(version)
            return None


@dataclass(frozen=True, eq=False)
class _Running:
    actor: Any
    ready: "ray.ObjectRef[None]"


def _offsets(registry: Registry, version: int) -> dict[int, int]:
    """How far into the log a teacher was trained."""
    offsets = registry.manifest("teacher", version).get("offsets", {})
    return {int(partition): int(offset) for partition, offset in offsets.items()}
