"""What a worker knows of a partition, and how it tells records from dead letters."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from services.core.errors import InvalidEventError
from services.core.eventlog import EPOCH_SPAN, Arrived, epoch_of
from services.core.events import EVENTS, Event, Item, dead_letter, decode_event, decode_item

DeadLetters: TypeAlias = list[tuple[bytes, bytes]]  # key, value


@dataclass
class Reading:
    """One partition: how far it is applied, and what of it the log doesn't have yet."""

    partition: int
    first: int  # log offset of the first record that the log lacks
    next: int  # log offset of the next record to apply
    rows: list[Arrived[Any]] = field(default_factory=list)
    dead: DeadLetters = field(default_factory=list)

    @property
    def base(self) -> int:
        """What turns a Kafka offset of this incarnation of the topic into a log offset."""
        return epoch_of(self.next) * EPOCH_SPAN


def sort_out(
    topic: str, records: Iterable[Any], *, base: int, now_ms: int, max_future_s: float
) -> tuple[list[Arrived[Any]], DeadLetters]:
    """The valid records, and dead letters (key, value) for the others. Pure."""
    rows: list[Arrived[Any]] = []
    dead: DeadLetters = []
    for record in records:
        # The producer's stamp where the broker has none of its own; never from the future.
        arrival_ms = min(record.timestamp, now_ms)
        raw = record.value or b""
        try:
            decoded: Event | Item = (
                decode_event(raw, arrival_ms=arrival_ms, max_future_s=max_future_s)
                if topic == EVENTS
                else decode_item(raw)
            )
        except InvalidEventError as error:
            letter = dead_letter(
                raw,
                reason=str(error),
                topic=topic,
                partition=record.partition,
                offset=record.offset,
            )
            dead.append((record.key or b"", letter))
        else:
            rows.append(
                Arrived(
                    record=decoded,
                    arrival_ms=arrival_ms,
                    partition=record.partition,
                    offset=base + record.offset,
                )
            )
    return rows, dead
