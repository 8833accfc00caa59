"""Trying another version on live users: beside what serves (split), or unseen (shadow). Pure.

Every impression of a trial says which trial it belongs to (`Trial.mark`), a split's which arm, a
shadow's what the other version would have shown. A list is answered by its user's next interaction
and hits if that item is on it, as the learner counts.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from services.core.events import INTERACTIONS, EventType

CANDIDATE: Final = "candidate"
SERVING: Final = "serving"
COLUMNS: Final = ("user_id", "item_id", "type", "context", "partition", "offset")
_STEPS: Final = 10_000  # a percent has two decimals

Mode = Literal["split", "shadow"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`percent` of the users are in it: always the same ones, and more of them as it is raised."""

    version: int
    mode: Mode
    percent: float
    since_ms: int

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent={self.percent:g}: above 0, at most 100")

    @property
    def mark(self) -> str:
        """Names this trial in impressions."""
        return f"{self.mode}-{self.version}-{self.since_ms}"

    def takes(self, user_id: str) -> bool:
        """Whether this user is in it; other users in a trial of another version."""
        digest = hashlib.blake2b(f"{self.version}:{user_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % _STEPS < self.percent * _STEPS / 100

    def arm(self, in_trial: bool) -> dict[str, Any]:
        """What a split's impression says of itself."""
        return {"trial": self.mark, "arm": CANDIDATE if in_trial else SERVING}

    def unseen(self, item_ids: list[str]) -> dict[str, Any]:
        """What a shadow's impression says of the list that nobody saw."""
        return {"trial": self.mark, "shadow": item_ids}


@dataclass(frozen=True)
class Arm:
    """How one arm's lists did."""

    shown: int = 0
    answered: int = 0
    hits: int = 0

    @property
    def rate(self) -> float | None:
        return self.hits / self.answered if self.answered else None

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Wilson's, of the hit rate."""
        if not self.answered:
            return None
        from scipy.stats import binomtest  # a second, for those who only read a pointer

        found = binomtest(self.hits, self.answered).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)


def score(portions: Iterable[pa.Table], trial: Trial) -> dict[str, Arm]:
    """Both arms of the trial, from portions of the offline log (`COLUMNS`), held one at a time: in
    order by partition and offset, within a portion any order.

    In a shadow trial both are judged by the same interactions; what was shown has the advantage
    that its user saw it.
    """
    awaiting: dict[str, dict[str, set[str]]] = {}
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for user_id, item_id, kind, context in itertools.chain.from_iterable(map(_rows, portions)):
        if kind == EventType.IMPRESSION:
            # One outside of the trial ends the wait, too: the user has a newer list.
            awaiting[user_id] = lists = _lists(context, trial)
            for arm in lists:
                counts[arm][0] += 1
            continue
        for arm, listed in awaiting.pop(user_id, {}).items():
            counts[arm][1] += 1
            counts[arm][2] += item_id in listed
    return {arm: Arm(*counts[arm]) for arm in (SERVING, CANDIDATE)}


def _rows(events: pa.Table) -> Iterable[tuple[str, str, str, str | None]]:
    wanted = pa.array([*INTERACTIONS, EventType.IMPRESSION.value])
    rows = events.filter(pc.is_in(events["type"], value_set=wanted))
    rows = rows.sort_by([("partition", "ascending"), ("offset", "ascending")])
    return zip(*(rows[name].to_pylist() for name in COLUMNS[:4]), strict=True)


def _lists(context: str | None, trial: Trial) -> dict[str, set[str]]:
    """Arm -> items, of an impression that belongs to the trial; else none."""
    if not context or trial.mark not in context:
        return {}
    told: dict[str, Any] = orjson.loads(context)
    if told.get("trial") != trial.mark:
        return {}
    if trial.mode == "split":
        return {told["arm"]: set(told["items"])}
    return {SERVING: set(told["items"]), CANDIDATE: set(told["shadow"])}
