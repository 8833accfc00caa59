"""What the distillation job remembers of each user: compact, bounded, in order of event time.

One structured row (22 bytes) per interaction; a user's rows are sorted by (event time, arrival).
The kept rows are context for the model, the mask of seen items, and the window in which a
producer's retry (same `event_id`) is recognised.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

EVENT = np.dtype([("row", "<i4"), ("type", "<i2"), ("time_ms", "<i8"), ("key", "<i8")])
NO_EVENTS: npt.NDArray[np.void] = np.zeros(0, EVENT)
EventRows = npt.NDArray[np.void]

SAMPLE_CAP = 256  # events beyond which a user is not drawn more often
SAMPLE_TRIES = 512  # draws before making do with nobody: one in 20,000 where each has 5 events
MOST_ONLY_SHOWN = 100_000  # users who have no events, only a list that they were shown


@dataclass(slots=True)
class _User:
    partition: int
    events: EventRows = field(default_factory=lambda: NO_EVENTS)
    shown: npt.NDArray[np.int32] | None = None  # the last list shown and not yet answered


class Histories:
    """Users' latest interactions, at most `keep` each.

    `partition` is the Kafka partition that carries the user's events: it decides which worker
    owns the user when a checkpoint is loaded by another number of workers.
    """

    def __init__(self, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        self._keep = keep
        self._users: dict[str, _User] = {}
        # Of those with events, by partition, in the order met: for `sample`.
        self._ids: dict[int, list[str]] = {}
        self._only_shown: dict[str, None] = {}  # the others, in the order met

    def __len__(self) -> int:
        return len(self._users)

    def __contains__(self, user_id: str) -> bool:
        return user_id in self._users

    def users(self) -> Iterator[str]:
        return iter(self._users)

    def of(self, user_id: str) -> EventRows:
        """The user's interactions, oldest first; empty for a user never met. Don't write to it."""
        user = self._users.get(user_id)
        return NO_EVENTS if user is None else user.events

    def partition_of(self, user_id: str) -> int:
        return self._users[user_id].partition

    def put(self, user_id: str, events: EventRows, *, partition: int) -> None:
        """Replace what is known of a user; the oldest beyond `keep` are forgotten."""
        user = self._users.get(user_id)
        if user is None or user_id in self._only_shown:
            self._only_shown.pop(user_id, None)
            user = self._users.setdefault(user_id, _User(partition))
            self._ids.setdefault(user.partition, []).append(user_id)
        user.events = events[-self._keep :].copy()

    def forget(self, user_id: str) -> bool:
        """Drop all that is known of a user; whether there was anything."""
        user = self._users.pop(user_id, None)
        if user is None:
            return False
        if user_id in self._only_shown:
            del self._only_shown[user_id]
        else:
            self._ids[user.partition].remove(user_id)
        return True

    def keep_only(self, keys: Iterable[npt.NDArray[np.int64]], *, partition: int) -> int:
        """Forget each of that partition's events whose key is in none of the arrays, and users who
        have none left; return how many events are gone."""
        user_ids = list(self._ids.get(partition, []))
        held = np.concatenate(
            [NO_EVENTS["key"], *(self.of(user_id)["key"] for user_id in user_ids)]
        )
        found = np.zeros(len(held), bool)
        for some in keys:
            found |= np.isin(held, some)
        end = 0
        for user_id in user_ids:
            events = self.of(user_id)
            begin, end = end, end + len(events)
            if not found[begin:end].any():
                self.forget(user_id)
            elif not found[begin:end].all():
                self.put(user_id, events[found[begin:end]], partition=partition)
        for user_id in [one for one in self._only_shown if self.partition_of(one) == partition]:
            self.forget(user_id)
        return int((~found).sum())

    def show(self, user_id: str, rows: npt.NDArray[np.int32], *, partition: int) -> None:
        """Remember the list that was shown; the user's next interaction answers it."""
        if user_id not in self._users:
            self._users[user_id] = _User(partition)
            self._only_shown[user_id] = None
            if len(self._only_shown) > MOST_ONLY_SHOWN:
                self.forget(next(iter(self._only_shown)))
        self._users[user_id].shown = rows

    def answer(self, user_id: str) -> npt.NDArray[np.int32] | None:
        """Take the list that awaits the user's answer, if there is one."""
        user = self._users.get(user_id)
        if user is None or user.shown is None:
            return None
        shown, user.shown = user.shown, None
        return shown

    def sizes(self) -> dict[int, int]:
        """How many users each partition has."""
        return {partition: len(ids) for partition, ids in self._ids.items() if ids}

    def sample(self, rng: np.random.Generator, *, partition: int) -> str | None:
        """A user of that partition, more likely one with more events; rarely none."""
        ids = self._ids.get(partition, [])
        for _ in range(SAMPLE_TRIES if ids else 0):
            user_id = ids[int(rng.integers(len(ids)))]
            if rng.random() * SAMPLE_CAP < len(self.of(user_id)):
                return user_id
        return None

    def to_table(self) -> pa.Table:
        """One line per user: user_id, partition, shown, and the columns of `EVENT` as lists."""
        users = list(self._users.values())
        events = np.concatenate([NO_EVENTS, *(user.events for user in users)])
        lengths = np.array([len(user.events) for user in users], np.int64)
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = {
            name: pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(events[name])))
            for name in EVENT.names or ()
        }
        shown = pa.array(
            [None if user.shown is None else user.shown.tolist() for user in users],
            pa.list_(pa.int32()),
        )
        return pa.table(
            {
                "user_id": pa.array(list(self._users), pa.string()),
                "partition": pa.array([user.partition for user in users], pa.int32()),
                "shown": shown,
                **columns,
            }
        )

    @classmethod
    def from_tables(
        cls, tables: Iterable[pa.Table], *, keep: int, rank: int = 0, world: int = 1
    ) -> "Histories":
        """Rebuild from what every worker saved, keeping the users that worker `rank` owns."""
        histories = cls(keep=keep)
        for table in tables:
            ends = table["row"].combine_chunks().offsets.to_numpy()
            events = np.zeros(int(ends[-1]) if len(ends) else 0, EVENT)
            for name in EVENT.names or ():
                events[name] = table[name].combine_chunks().flatten().to_numpy()
            ids = table["user_id"].to_pylist()
            partitions = table["partition"].to_pylist()
            for i, shown in enumerate(table["shown"].to_pylist()):
                if partitions[i] % world == rank:
                    own = events[ends[i] : ends[i + 1]]
                    if len(own):
                        histories.put(ids[i], own, partition=partitions[i])
                    if shown is not None:
                        listed = np.array(shown, np.int32)
                        histories.show(ids[i], listed, partition=partitions[i])
        return histories


def merged(known: EventRows, new: EventRows) -> tuple[EventRows, npt.NDArray[np.bool_]]:
    """Both in order of event time (of equals the known first), and which of them are new."""
    both = np.concatenate([known, new])
    order = np.argsort(both["time_ms"], kind="stable")
    return both[order], order >= len(known)


def first_seen(keys: npt.NDArray[np.int64], known: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of `keys` appear for the first time: neither in `known` nor earlier in `keys`."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first & ~np.isin(keys, known)
