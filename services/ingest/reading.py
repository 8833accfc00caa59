"""What a worker knows of a partition, and how it tells records from dead letters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from services.core.errors import InvalidEventError
from services.core.eventlog import EPOCH_SPAN, Arrived, epoch_of
from services.core.events import (
    EVENTS,
    dead_letter,
    decode_event,
    decode_item,
    decode_user_id,
)
from services.core.forgetting import Tombstone

MAX_KEY_BYTES: Final = 1024  # what an id has at most
DeadLetters: TypeAlias = list[tuple[bytes, bytes]]  # key, value


@dataclass
class Reading:
    """One partition: how far it is applied, and what of it the log doesn't have yet."""

    partition: int
    first: int  # log offset of the first record that the log lacks
    next: int  # log offset of the next record to apply
    rows: list[Arrived[Any]] = field(default_factory=list)
    dead: DeadLetters = field(default_factory=list)
    forgotten: list[Tombstone] = field(default_factory=list)
    n_bytes: int = 0  # of the records since `first`, as Kafka has them

    @property
    def base(self) -> int:
        """What turns a Kafka offset of this incarnation of the topic into a log offset."""
        return epoch_of(self.next) * EPOCH_SPAN


@dataclass(kw_only=True)
class Sorted:
    """What was polled of one partition."""

    topic: str
    base: int
    valid: list[Arrived[Any]] = field(default_factory=list)
    dead: DeadLetters = field(default_factory=list)
    forgotten: list[Tombstone] = field(default_factory=list)

    def bury(self, records: Sequence[Any], poison: Sequence[tuple[Arrived[Any], str]]) -> None:
        """Make dead letters of those valid records of ours that turned out to be poison."""
        reasons = {id(arrived): reason for arrived, reason in poison}
        raw = {self.base + record.offset: record for record in records} if reasons else {}
        for arrived in [arrived for arrived in self.valid if id(arrived) in reasons]:
            self.valid.remove(arrived)
            self.dead.append(_letter(self.topic, raw[arrived.offset], reasons[id(arrived)]))


def sort_out(
    topic: str, records: Iterable[Any], *, base: int, now_ms: int, max_future_s: float
) -> Sorted:
    """The valid records, whom to forget, and dead letters (key, value) for the rest. Pure.

    A user's events before the wish to forget them are not among the valid ones.
    """
    found = Sorted(topic=topic, base=base)
    for record in records:
        # The producer's stamp where the broker has none of its own; never from the future.
        arrival_ms = min(record.timestamp, now_ms)
        try:
            if topic == EVENTS and record.value is None and record.key:
                user_id = decode_user_id(record.key)
                found.valid = [one for one in found.valid if one.record.user_id != user_id]
                found.forgotten.append(
                    Tombstone(
                        user_id=user_id, partition=record.partition, offset=base + record.offset
                    )
                )
                continue
            decode = decode_event if topic == EVENTS else decode_item
            decoded = decode(record.value or b"", arrival_ms=arrival_ms, max_future_s=max_future_s)
        except InvalidEventError as error:
            found.dead.append(_letter(topic, record, str(error)))
        else:
            found.valid.append(
                Arrived(
                    record=decoded,
                    arrival_ms=arrival_ms,
                    partition=record.partition,
                    offset=base + record.offset,
                )
            )
    return found


def _letter(topic: str, record: Any, reason: str) -> tuple[bytes, bytes]:
    letter = dead_letter(
        record.value or b"",
        reason=reason,
        topic=topic,
        partition=record.partition,
        offset=record.offset,
    )
    return (record.key or b"")[:MAX_KEY_BYTES], letter
