"""One teacher version as Ray actors that label, each with CPUs or a part of a GPU of its own.

They share every micro-batch. There are more of them while the student waits for labels, and fewer
once it doesn't, whatever the number of training workers.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from ray_jobs import own_ray
from ray_jobs.labels import Items, Labels, aligned, items_of, label
from ray_jobs.microbatch import MicroBatch
from services.core.catalog import Catalog
from services.core.memory import Trimmer
from services.core.models.teacher import Teacher
from services.core.registry import Registry

LATE_UNTIL_MORE = 10  # answers in a row that kept the student waiting, until one more
EARLY_UNTIL_FEWER = 1_000  # answers in a row that were there in time, until one less

Answer = list["ray.ObjectRef[Labels]"]  # the labels of a batch's parts, in order


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
        own_ray.step_back(niceness)
        torch.set_num_threads(threads)
        self._device = device
        self._trimmer = Trimmer()
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
        self._trimmer.tick()
        return label(self._aligned, batch, **how)


class Pool:
    """The labellers of one version: `least` to `most` actors, which `start` starts one by one.

    `catalog`: what `Labeller.align` takes.
    """

    def __init__(
        self, start: Callable[[], Any], catalog: tuple[Any, ...], *, least: int, most: int
    ) -> None:
        self._start, self._catalog = start, catalog
        self._least, self._most = least, most
        self._loading: list[tuple[Any, ray.ObjectRef[None]]] = []
        self._ready: list[Any] = []
        self._late = self._early = 0  # answers in a row
        for _ in range(least):
            self._add()

    def able(self) -> bool:
        """Whether labels may be asked for: an actor that still loads would keep us waiting.
        Raises a `RayError` where one could not be started."""
        for actor, ready in self._loading.copy():
            if ray.wait([ready], timeout=0)[0]:
                ray.get(ready)
                self._loading.remove((actor, ready))
                self._ready.append(actor)
        return len(self._ready) >= self._least

    def wait(self, timeout_s: float) -> None:
        """Until all that load are ready."""
        refs = [ready for _, ready in self._loading]
        ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    def align(self, catalog: tuple[Any, ...]) -> None:
        self._catalog = catalog
        for actor in [*self._ready, *(actor for actor, _ in self._loading)]:
            actor.align.remote(*catalog)

    def items(self) -> Items:
        items: Items = ray.get(self._ready[0].items.remote())
        return items

    def cut(self, batch: MicroBatch) -> "list[tuple[int, ray.ObjectRef[MicroBatch]]]":
        """A part for each actor: its number of targets, and the part."""
        return [(len(part), ray.put(part)) for part in batch.parts(len(self._ready))]

    def label(
        self,
        parts: "Sequence[tuple[int, ray.ObjectRef[MicroBatch]]]",
        *,
        n_ranked: int = 0,
        **how: Any,
    ) -> Answer:
        """Ask for labels; ranks of the first `n_ranked` targets."""
        answer = []
        for i, (n, part) in enumerate(parts):
            actor = self._ready[i % len(self._ready)]
            answer.append(actor.label.remote(part, n_ranked=min(n, n_ranked), **how))
            n_ranked = max(0, n_ranked - n)
        return answer

    def get(self, answer: Answer) -> Labels:
        """The labels, once they are there; from how often they weren't follows how many label."""
        ready, _ = ray.wait(answer, num_returns=len(answer), timeout=0)
        late = len(ready) < len(answer)
        self._late, self._early = (self._late + 1, 0) if late else (0, self._early + 1)
        if self._late >= LATE_UNTIL_MORE and len(self._ready) + len(self._loading) < self._most:
            self._late = 0
            self._add()
        if self._early >= EARLY_UNTIL_FEWER and len(self._ready) > self._least:
            self._early = 0
            self._ready.pop()  # an actor ends with its last reference
        return Labels.joined(ray.get(answer))

    def _add(self) -> None:
        actor = self._start()
        self._loading.append((actor, actor.align.remote(*self._catalog)))
