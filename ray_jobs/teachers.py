"""The teachers that label, as Ray actors: the current one, the next one loading, the first one.

A teacher is taken up without stopping: its actor loads beside the current one, and takes over
when it is ready. What a teacher says of a micro-batch is asked for before the student predicts
and learns, and fetched when it is needed, so that the two work at the same time.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray

from ray_jobs.labellers import Answer, Labeller, Pool
from ray_jobs.labels import Items, Labels
from ray_jobs.microbatch import MicroBatch
from ray_jobs.peers import ALONE, Peers
from ray_jobs.recipes import DistillConfig
from services.core.catalog import Catalog
from services.core.errors import NothingServingError, RegistryError
from services.core.metrics import Ranks
from services.core.registry import Registry

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # for a newly promoted teacher
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers on their way, and who gives them."""

    teacher: Any = None  # as whoever was asked understands it; None: nobody was
    stale: Any = None
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
        peers: Peers = ALONE,
    ) -> None:
        self._peers = peers
        self._registry = Registry(registry_uri)
        self._config = config
        self._width = width
        self._running: dict[int, Pool] = {}
        self._failed: set[int] = set()
        self._catalog: tuple[list[str], NDArray[np.int32]] = ([], np.zeros((1, 0), np.int32))
        self._wanted: int | None = None
        self._looked_s = -LOOK_EVERY_S
        self._late_s = 0.0  # when to warn that the wanted one still loads
        self.version: int | None = None
        self.first = first
        self.offsets: Mapping[int, int] = {}

    def align(self, catalog: Catalog) -> None:
        """Tell every labeller about new rows and content."""
        self._catalog = (catalog.ids(range(1, len(catalog))), catalog.content.copy())
        for pool in self._running.values():
            pool.align(self._catalog)

    def start(self, *, wait: bool) -> None:
        """Take up the teacher that is promoted now, if there is one; `wait` until it is ready."""
        self.look()
        if self.first is not None and self._config.stale_teacher:
            try:
                self._registry.manifest("teacher", self.first)
                self._load(self.first)
            except RegistryError as error:
                logger.warning("the first teacher is gone, its row ends here: %s", error)
        if wait and self._wanted is not None:
            self._running[self._wanted].wait(READY_TIMEOUT_S)
        self.look()

    def look(self) -> None:
        """See, once a second, whether another teacher was promoted; swap when it is ready for all
        workers, so that they learn from the same one. One that fails for any is left alone."""
        promoted = self._peers.gather(self._newly_promoted())[0]
        if promoted is not None:
            if self._wanted not in (self.version, self.first):
                self._running.pop(self._wanted or 0, None)  # overtaken while it loaded
            self._wanted = promoted
            self._late_s = time.monotonic() + READY_TIMEOUT_S
            self._load(promoted)
        if self._wanted is None or self._wanted == self.version:
            return
        able = self._able(self._wanted) is not None
        told = self._peers.gather((able, self._wanted in self._failed))
        if any(failed for _, failed in told):
            self._failed.add(self._wanted)
            self._running.pop(self._wanted, None)
            self._wanted = self.version
        if not all(able for able, _ in told):
            self._warn_if_late()
            return
        gone, self.version = self.version, self._wanted
        assert self.version is not None
        self.first = self.first or self.version
        self.offsets = _offsets(self._registry, self.version)
        if gone is not None and gone != self.first:
            self._running.pop(gone, None)  # the actor ends with its last reference
        logger.info("teacher %d labels from now on", self.version)

    def _warn_if_late(self) -> None:
        if self._wanted != self.version and time.monotonic() > self._late_s:
            self._late_s = time.monotonic() + READY_TIMEOUT_S
            logger.warning(
                "teacher %s has been loading for %.0f s or more: has the cluster the CPUs, or "
                "GPUs, that its labellers wait for?",
                *(self._wanted, READY_TIMEOUT_S),
            )

    def _newly_promoted(self) -> int | None:
        """What worker 0 finds; the others take its word."""
        if time.monotonic() - self._looked_s <= LOOK_EVERY_S:
            return None
        self._looked_s = time.monotonic()
        try:
            promoted = self._registry.serving("teacher").version
        except NothingServingError:
            return None
        except (RegistryError, OSError) as error:  # who labels goes on
            logger.warning("no look for another teacher: %s", error)
            return None
        return None if promoted in self._failed or promoted == self._wanted else promoted

    def items(self) -> Items | None:
        """The current teacher's view of the items; None where there is no teacher."""
        pool = self._able(self.version)
        try:
            return None if pool is None else pool.items()
        except ray.exceptions.RayError as error:
            logger.warning("teacher %s doesn't tell of its items: %s", self.version, error)
            return None

    def ask_labels(self, batch: MicroBatch) -> Asked:
        """Ask for labels alone, of what need not be scored."""
        pool = self._able(self.version)
        if pool is None or not self._config.needs_labels:
            return Asked()
        answer = pool.label(pool.cut(batch), top_k=self._config.top_k)
        return Asked(answer, version=self.version)

    def ask(self, batch: MicroBatch, *, stale: bool, **how: Any) -> Asked:
        """Ask for labels of a batch; `stale`: for the first teacher's ranks as well."""
        pool = self._able(self.version)
        if pool is None:
            return Asked()
        parts = pool.cut(batch)  # once, for both
        how = {**how, "top_k": self._config.top_k}
        answer = pool.label(parts, **how)
        if not stale or not self._config.stale_teacher:
            return Asked(answer, version=self.version)
        if self.first == self.version:
            return Asked(answer, version=self.version, same=True)
        first = self._able(self.first)
        stale_answer = None if first is None else first.label(parts, **how)
        return Asked(answer, stale_answer, version=self.version)

    def answer(self, asked: Asked) -> tuple[Labels | None, Ranks | None]:
        """Labels, and the first teacher's ranks; None where nobody was asked, or it failed."""
        labels = self._get(asked.teacher, asked.version)
        if asked.same:
            return labels, None if labels is None else labels.ranks
        stale = self._get(asked.stale, self.first)
        return labels, None if stale is None else stale.ranks

    def _load(self, version: int) -> None:
        """Start its labellers, unless they run."""
        if version in self._running:
            return
        config = self._config
        # Without the strategy they would have to fit into the training worker's own bundle.
        options = {
            "num_cpus": config.label_cpus,
            "num_gpus": config.label_gpus,
            "scheduling_strategy": "DEFAULT",
            "enable_task_events": False,  # a call for each micro-batch says nothing new
        }
        start = partial(
            ray.remote(Labeller).options(**options).remote,
            self._registry.uri,
            version,
            width=self._width,
            threads=config.threads_per_worker,
            niceness=config.niceness,
            device="cuda" if config.label_gpus else "cpu",
        )
        most = max(config.label_actors, config.label_actors_most)
        self._running[version] = Pool(start, self._catalog, least=config.label_actors, most=most)

    def _able(self, version: int | None) -> Pool | None:
        """The labellers of that version, if they are ready."""
        pool = self._running.get(version or 0)
        try:
            return pool if pool is not None and pool.able() else None
        except ray.exceptions.RayError as error:
            logger.warning("teacher %s can't label: %s", version, error)
            self._running.pop(version or 0)
            if isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed:
                self._load(version or 0)  # lost, with its node perhaps, not at fault
            else:
                self._failed.add(version or 0)
            return None

    def _get(self, answer: Answer | None, version: int | None) -> Labels | None:
        if answer is None:
            return None
        pool = self._running.get(version or 0)
        try:  # an actor whose version was replaced still answers what it was asked
            return Labels.joined(ray.get(answer)) if pool is None else pool.get(answer)
        except ray.exceptions.RayActorError as error:
            logger.warning("teacher %s stopped labelling, starting it again: %s", version, error)
            if self._running.pop(version or 0, None) is not None:
                self._load(version or 0)
        except ray.exceptions.RayError as error:  # out of GPU memory, say: the next may fit
            logger.warning("teacher %s gave no labels: %s", version, error)
        return None


def _offsets(registry: Registry, version: int) -> dict[int, int]:
    """How far into the log a teacher was trained."""
    offsets = registry.manifest("teacher", version).get("offsets", {})
    return {int(partition): int(offset) for partition, offset in offsets.items()}
