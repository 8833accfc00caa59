"""What a run promised, checked against what is there afterwards. Pure, but for reading it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pyarrow.fs

from ray_jobs.stop_file import RUN
from services.core.eventlog import EventLog, epoch_of, kafka_offset
from services.core.events import EVENTS, MAX_TIMESTAMP_MS
from services.core.features import FeatureStore
from services.core.history import UserHistory, histories_as_of
from services.core.settings import Settings
from services.core.spans import filesystem
from services.local.load import Request
from services.local.promises import Promise

Window = tuple[float, float]  # monotonic seconds
Ranges = Sequence[Sequence[int]]  # [first, next) in the order learned


def logged_once(
    acknowledged: Mapping[str, float], logged: Iterable[str], *, lost_windows: Sequence[Window] = ()
) -> Promise:
    """Every acknowledged event is in the log exactly once.

    lost_windows: (from, to), in which a broker that keeps its log in memory died with what nobody
    had read yet; what was acknowledged there and is missing breaks no promise.
    """
    counts = Counter(logged)
    missing = {event_id: at_s for event_id, at_s in acknowledged.items() if not counts[event_id]}
    excused = sum(any(a <= at_s <= b for a, b in lost_windows) for at_s in missing.values())
    twice = sum(counts[event_id] > 1 for event_id in acknowledged)
    found = f"{len(acknowledged):,} acknowledged, {len(missing) - excused} lost, {twice} twice"
    if excused:
        found += f"; {excused} died unread with the embedded broker, a real Kafka keeps them"
    return Promise(
        name="acknowledged events in the log exactly once",
        kept=len(missing) == excused and not twice,
        found=found,
    )


def online_as_recomputed(
    online: Sequence[UserHistory], recomputed: Sequence[UserHistory]
) -> Promise:
    """The online sequences equal what the log gives."""
    different = [
        one.user_id
        for one, other in zip(online, recomputed, strict=True)
        if _comparable(one) != _comparable(other)
    ]
    return Promise(
        name="online sequences equal a recomputation",
        kept=not different,
        found=f"{len(online):,} users, {len(different)} differ",
    )


def learned_once(ledger: Mapping[int, Ranges], end: Mapping[int, int]) -> Promise:
    """The ranges that the distillation job has learned join, without gap or overlap, from the
    log's start to its end; where the topic was created anew, the new one's begin at its start."""
    gaps = overlaps = 0
    for partition in ledger.keys() | end.keys():
        at = 0
        for first, following in [*ledger.get(partition, []), [end.get(partition, 0)] * 2]:
            anew = epoch_of(first) > epoch_of(at) and kafka_offset(first) == 0
            gaps += first > at and not anew
            overlaps += first < at
            at = max(at, following)
    return Promise(
        name="each event learned exactly once",
        kept=not gaps and not overlaps,
        found=f"{len(ledger)} partitions, {gaps} gaps, {overlaps} overlaps",
    )


def answered(
    asked: Sequence[Request], *, deadline_s: float, share: float, excused: Sequence[Window] = ()
) -> Promise:
    """At least `share` of the requests got a 200 within the deadline, outside `excused`."""
    counted = [one for one in asked if not any(a <= one.at_s <= b for a, b in excused)]
    failed = [one for one in counted if not one.good(deadline_s)]
    statuses = dict(sorted(Counter(one.status for one in failed).items()))
    others = f"others by status (0: none came) {statuses}"
    if failed:
        others += f", from {failed[0].at_s - asked[0].at_s:.0f} s on"
    reached = 1 - len(failed) / len(counted) if counted else 0.0
    return Promise(
        name=f"{share:.1%} of the requests answered within {deadline_s:g} s",
        kept=reached >= share,
        found=f"{reached:.3%} of {len(counted):,}; {others}",
    )


def audit_state(
    settings: Settings, acknowledged: Mapping[str, float], *, lost_windows: Sequence[Window] = ()
) -> list[Promise]:
    """Compare log, online store and the learner's newest checkpoint. Nothing may be under way."""
    log = EventLog(settings.offline, EVENTS)
    rows = log.read()
    users = sorted(set(rows["user_id"].to_pylist()))
    until_ms = [MAX_TIMESTAMP_MS + 1] * len(users)
    recomputed = histories_as_of(rows, users, until_ms, limit=settings.history_events)
    # Whoever was only ever shown something has no history.
    known = [row for row in recomputed if row.item_ids]
    online = FeatureStore(settings).read_users([row.user_id for row in known])
    return [
        logged_once(acknowledged, rows["event_id"].to_pylist(), lost_windows=lost_windows),
        online_as_recomputed(online, known),
        learned_once(newest_ledger(settings.checkpoints), log.end()),
    ]


def newest_ledger(checkpoints: str) -> dict[int, Ranges]:
    """What the newest checkpoint of the distillation job says it has learned, of all workers."""
    fs, root = filesystem(checkpoints)
    selector = pyarrow.fs.FileSelector(f"{root}/{RUN}", recursive=True, allow_not_found=True)
    owns = [i.path for i in fs.get_file_info(selector) if i.path.endswith("/own.json")]
    newest = max((path.rsplit("/", 2)[0] for path in owns), default="")
    ledger: dict[int, Ranges] = {}
    for path in owns:
        if path.startswith(f"{newest}/"):
            with fs.open_input_stream(path) as stream:
                own = json.loads(stream.read())
            ledger |= {int(partition): ranges for partition, ranges in own["ledger"].items()}
    return ledger


def _comparable(history: UserHistory) -> UserHistory:
    """Without what depends on the moment of writing; NaN equals NaN as text."""
    values = tuple(map(str, history.values))
    return replace(
        history,
        updated_ms=0,
        partition=-1,
        offset=-1,
        values=values,  # type: ignore[arg-type]
    )
