"""From the learning student to versions in the registry, through the gate.

Every new event is scored twice before it is learned: by the student and by the newest version that
is proved, which is what the gate compares. A candidate that passes answers at once, so that news
does within seconds; it is proved, and the next yardstick, once it has passed over `proof_events`.
Where a loss shows only after such promotions, the student goes back to the proved version, and the
next version puts right what serves. Going back halves the learning rate, a proof doubles it again.
"""

import copy
import itertools
import logging
import tempfile
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from ray_jobs import gate
from ray_jobs.checkpoint import State
from ray_jobs.gate import Evidence, Gains, Verdict
from ray_jobs.learner import adam, set_learning_rate
from ray_jobs.microbatch import MicroBatch
from ray_jobs.peers import Peers
from ray_jobs.ranking import top_lists
from ray_jobs.recipes import DistillConfig
from ray_jobs.telemetry import Telemetry
from services.core.errors import RegistryError
from services.core.eventlog import epoch_of
from services.core.metrics import Prequential, Ranks, gains_at
from services.core.registry import Registry

logger = logging.getLogger(__name__)

FEATURE_SERVICE = "recommender_v1"
RECENT_EVENTS = 20_000  # the gate looks no further back
MIN_LEARNING_RATE = 1e-5
MOST_ARRIVALS = 100_000  # of events that no version tells of yet
K = 10


class Publisher:
    """Publishes `state.student`, promotes what passes, and pulls the job back when too much fails.

    All workers call it together; worker 0 alone writes to the registry.
    """

    def __init__(
        self,
        registry_uri: str,
        state: State,
        *,
        config: DistillConfig,
        keep: int,
        peers: Peers,
        telemetry: Telemetry,
    ) -> None:
        self._registry = Registry(registry_uri)
        self._state = state
        self._config = config
        self._keep = keep
        self._peers = peers
        self._telemetry = telemetry
        self._own_gains: list[Gains] = []  # as `State.gains`, not yet told to the others
        self._arrivals_ms = np.zeros(0, np.int64)
        self._positions: dict[int, int] = {}  # as of the newest version
        self._teacher: int | None = None  # the same

    def behind(self) -> bool:
        """Whether the newest version doesn't tell how far the job has come, or by which teacher."""
        return (self._positions, self._teacher) != (
            self._state.positions,
            self._state.counters.teacher,
        )

    def scored(self, student: Ranks, proved: Ranks | None) -> None:
        """Take in one micro-batch's ranks, before it is learned."""
        if proved is not None:
            self._own_gains.append(np.stack([gains_at(student, K), gains_at(proved, K)]))

    def forget_gains(self) -> None:
        """The student is another one: nothing speaks for or against it yet."""
        self._state.gains = self._state.gains[:, :0]
        self._own_gains = []

    def learned(self, arrivals_ms: NDArray[np.int64]) -> None:
        known = np.concatenate([self._arrivals_ms, arrivals_ms])
        self._arrivals_ms = known[-MOST_ARRIVALS:]  # else without end, while nothing can be written

    def publish(self, probe: MicroBatch) -> Verdict:
        """Judge the student, publish it with the verdict, promote it or keep it.

        `probe`: some users' latest sequences, to see whether the answers still differ.
        """
        state, counters = self._state, self._state.counters
        told = itertools.chain(*self._peers.gather(self._own_gains))
        state.gains = np.concatenate([state.gains, *told], axis=1)[:, -RECENT_EVENTS:]
        self._own_gains = []
        verdict = self._judge(probe)
        rejected_in_a_row = 0 if verdict.promoted else counters.rejected_in_a_row + 1
        if verdict.promoted:
            verdict = self._peers.gather(self._unless_held(verdict))[0]
        pull_back = state.proved is not None and self._must_go_back(rejected_in_a_row)
        if pull_back:
            reason = (
                f"{verdict.reason}; rejected {rejected_in_a_row} times in a row: back to "
                f"version {counters.proved}, learning rate {self._halved():g}"
            )
            verdict = Verdict(promoted=False, reason=reason)
        qualities = self._peers.gather(state.quality)
        positions = _merged(self._peers.gather(state.positions))
        arrivals_ms = np.concatenate(self._peers.gather(self._arrivals_ms))
        written = self._peers.rank != 0 or self._try_to_write(
            verdict, qualities, positions, arrivals_ms
        )
        written, counters.published, counters.serving = self._peers.gather(
            (written, counters.published, counters.serving)
        )[0]
        if not written:
            return Verdict(promoted=False, reason="the registry couldn't be written")
        counters.rejected_in_a_row = rejected_in_a_row
        if verdict.promoted:
            state.frozen = state.frozen or copy.deepcopy(state.student)
            n_events = state.gains.shape[1]
            if state.proved is None or n_events >= self._config.bar.proof_events:
                self._prove()
        if pull_back:
            self._back_to_proved()
        self._arrivals_ms = self._arrivals_ms[:0]
        state.quality.start_window()
        self._positions = dict(state.positions)
        self._teacher = counters.teacher
        return verdict

    def _must_go_back(self, rejected_in_a_row: int) -> bool:
        """After too many rejections; after one, if what serves is later than the proved version: it
        was promoted on less than what speaks against the candidate now."""
        counters = self._state.counters
        if rejected_in_a_row and counters.serving != counters.proved:
            return True
        return rejected_in_a_row >= self._config.failures_until_reset

    def _halved(self) -> float:
        return max(self._state.counters.learning_rate / 2, MIN_LEARNING_RATE)

    def _prove(self) -> None:
        """The student as just promoted is the yardstick from now on."""
        state = self._state
        state.proved = copy.deepcopy(state.student)
        state.counters.proved = state.counters.published
        self._learn_at(min(2 * state.counters.learning_rate, self._config.learning_rate))
        self.forget_gains()

    def _learn_at(self, learning_rate: float) -> None:
        self._state.counters.learning_rate = learning_rate
        set_learning_rate(self._state.optimizer, learning_rate)

    def _judge(self, probe: MicroBatch) -> Verdict:
        student, proved = self._state.gains
        finite = all(bool(torch.isfinite(p).all()) for p in self._state.student.parameters())
        evidence = Evidence(
            finite=finite,
            lists=np.concatenate(self._peers.gather(top_lists(self._state.student, probe))),
            gains=student,
            proved_gains=proved,
        )
        return gate.judge(evidence, bar=self._config.bar)

    def _unless_held(self, verdict: Verdict) -> Verdict:
        try:
            held = self._registry.held("student")
        except (OSError, RegistryError) as error:  # it may be held: nobody can tell
            return Verdict(promoted=False, reason=f"the registry can't be read ({error})")
        if held is None:
            return verdict
        return Verdict(
            promoted=False, reason=f"student {held} is held by hand (`reflux models release`)"
        )

    def _try_to_write(
        self,
        verdict: Verdict,
        qualities: list[Prequential],
        positions: dict[int, int],
        arrivals_ms: NDArray[np.int64],
    ) -> bool:
        """False where the registry's disk is full or its store away: the job learns on, and the
        next version tells of all that this one would have told."""
        try:
            self._write(verdict, qualities, positions, arrivals_ms)
        except (OSError, RegistryError) as error:
            logger.error("no new version, the registry can't be written: %s", error)
            return False
        return True

    def _write(
        self,
        verdict: Verdict,
        qualities: list[Prequential],
        positions: dict[int, int],
        arrivals_ms: NDArray[np.int64],
    ) -> None:
        state, counters = self._state, self._state.counters
        metrics = {**Prequential.total(qualities).metrics(), **self._live()}
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            state.student.save(directory)
            pq.write_table(state.catalog.to_table(), directory / "catalog.parquet")
            counters.published = self._registry.publish(
                "student",
                directory,
                {
                    "metrics": metrics,
                    "teacher_version": counters.teacher,
                    "offsets": {str(partition): at for partition, at in positions.items()},
                    "epoch": max(map(epoch_of, positions.values()), default=0),
                    "feature_service": FEATURE_SERVICE,
                    "code_version": package_version("reflux"),
                    "parent": counters.serving,
                    "gate": verdict.as_manifest(),
                    "arrivals_ms": _arrived(arrivals_ms),
                    "events_learned": counters.events_learned,
                    "learning_rate": counters.learning_rate,
                    "items": len(state.catalog) - 1,
                },
            )
        if verdict.promoted:
            self._registry.promote("student", counters.published, verdict.reason)
            counters.serving = counters.published
        else:
            logger.warning("student %d is kept: %s", counters.published, verdict.reason)
        self._telemetry.judged(verdict, version=counters.published, metrics=metrics)
        self._prune()

    def _prune(self) -> None:
        try:
            self._registry.prune("student", self._keep)
        except (OSError, RegistryError) as error:  # what was promoted is, all the same
            logger.error("old versions stay for now: %s", error)

    def _back_to_proved(self) -> None:
        """Learn on from the proved version; moments of the failed way are forgotten."""
        state = self._state
        assert state.proved is not None
        state.student = copy.deepcopy(state.proved)
        state.optimizer = adam(state.student, self._config)
        self._learn_at(self._halved())
        state.counters.rejected_in_a_row = 0
        self.forget_gains()

    def _live(self) -> dict[str, float]:
        counters = self._state.counters
        if not counters.lists_answered:
            return {}
        return {
            "live.lists": counters.lists_answered,
            "live.hit@10": counters.lists_hit / counters.lists_answered,
        }


def _arrived(arrivals_ms: NDArray[np.int64]) -> dict[str, int] | None:
    """When the events arrived that a version has learned and the one before hadn't."""
    if len(arrivals_ms) == 0:
        return None
    oldest, median, newest = np.percentile(arrivals_ms, [0, 50, 100], method="nearest")
    return {"oldest": int(oldest), "median": int(median), "newest": int(newest)}


def _merged(parts: list[dict[int, int]]) -> dict[int, int]:
    return {partition: at for part in parts for partition, at in part.items()}
