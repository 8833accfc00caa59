"""What became of each record of a topic: logged, a dead letter, a wish, forgotten, or lost."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from kafka import TopicPartition

from services.core.errors import InvalidEventError
from services.core.eventlog import EventLog
from services.core.events import EVENTS, MAX_TIMESTAMP_MS, decode_event
from services.core.kafka import end_offsets, make_consumer, read_up_to
from services.core.settings import Settings
from services.ingest.dead import dead_letters
from services.local.promises import Promise

SHOWN: Final = 3  # of what is lost
SHOWN_BYTES: Final = 200
GIVE_UP_S: Final = 30.0  # a fetch from a broker that holds a million batches takes seconds

Position = tuple[int, int]  # partition, offset


def account(
    settings: Settings, topic: str, begin: Mapping[int, int], *, acknowledged: int
) -> Promise:
    """Every record since `begin`, read once more from Kafka and found again: in the log, among the
    dead letters, as a wish to be forgotten, or gone with the user who wished it. No fewer than were
    acknowledged. The log may have nothing under way, and the topic its first epoch."""
    log = EventLog(settings.offline, topic)
    columns = ["partition", "offset", *(["event_id"] if topic == EVENTS else [])]
    rows = log.read(since=begin, columns=columns).to_pydict()
    logged = set(zip(rows["partition"], rows["offset"], strict=True))
    event_ids = set(rows.get("event_id", ()))
    dead = {(letter.partition, letter.offset) for letter in dead_letters(settings, [topic])}
    found: Counter[str] = Counter()
    gone: set[str] = set()  # users
    rest: dict[Position, bytes] = {}
    for record in _since(settings, topic, begin):
        position = (record.partition, record.offset)
        if position in logged:
            found["in the log"] += 1
        elif position in dead:
            found["dead letters with a reason"] += 1
        elif record.value is None:
            found["wishes to be forgotten"] += 1
            gone.add(record.key.decode())
        else:
            rest[position] = record.value
    lost = []
    for position, value in rest.items():
        user_id, event_id = _who(topic, value)
        if user_id in gone:
            found["forgotten with their user"] += 1
        elif event_id in event_ids:
            found["said before"] += 1
        else:
            lost.append(f"{position}: {value[:SHOWN_BYTES]!r}")
    n = found.total() + len(lost)
    told = [f"{count:,} {what}" for what, count in found.items()]
    return Promise(
        name=f"every record of {topic} accounted for",
        kept=not lost and n >= acknowledged,
        found=f"{n:,} in Kafka ({acknowledged:,} acknowledged): "
        + ", ".join([*told, f"{len(lost):,} lost", *lost[:SHOWN]]),
    )


def _who(topic: str, value: bytes) -> tuple[str | None, str | None]:
    """User and event id of an event; of anything else nobody's."""
    if topic != EVENTS:
        return None, None
    try:
        event = decode_event(value, arrival_ms=MAX_TIMESTAMP_MS, max_future_s=0)
    except InvalidEventError:
        return None, None
    return event.user_id, event.event_id


def _since(settings: Settings, topic: str, begin: Mapping[int, int]) -> Iterator[Any]:
    ends = {TopicPartition(topic, at): end for at, end in end_offsets(settings, topic).items()}
    consumer = make_consumer(settings)
    try:
        consumer.assign(list(ends))
        for where in ends:
            consumer.seek(where, begin.get(where.partition, 0))
        yield from read_up_to(consumer, ends, give_up_s=GIVE_UP_S)
    finally:
        consumer.close()
