"""Dead letters: what is in them, and back with them once the cause is gone."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from kafka import KafkaConsumer, TopicPartition
from kafka.structs import OffsetAndMetadata

from services.core.events import EVENTS, ITEMS, dead_topic
from services.core.kafka import Publisher, end_offsets, make_consumer, read_up_to
from services.core.settings import Settings

GROUP: Final = "reflux-dead-letters"  # its commits say what has been replayed


@dataclass(frozen=True, kw_only=True)
class Dead:
    """One record that was refused, as it came."""

    topic: str
    partition: int
    offset: int
    reason: str
    key: bytes
    raw: bytes
    cut_bytes: int  # of a huge record, missing at the end of `raw`
    at_ms: int
    position: int  # in the dead-letter topic


def dead_letters(settings: Settings, topics: Sequence[str] = (EVENTS, ITEMS)) -> Iterator[Dead]:
    """Those of these topics that have not been replayed yet, each topic's oldest first."""
    for topic in topics:
        yield from _of(settings, topic)


def replay(settings: Settings) -> int:
    """Send each to the topic that it came from, once more; how many.

    What is still refused comes back as a new dead letter. One that was cut is not sent: what is
    left of it is no record.
    """
    publisher = Publisher(settings)
    sent = 0
    try:
        for topic in (EVENTS, ITEMS):
            letters = list(_of(settings, topic))
            if letters:
                whole = [letter for letter in letters if not letter.cut_bytes]
                publisher.publish(topic, [(letter.key, letter.raw) for letter in whole])
                _commit(settings, topic, letters[-1].position + 1)
                sent += len(whole)
    finally:
        publisher.close()
    return sent


def _of(settings: Settings, topic: str) -> Iterator[Dead]:
    name = dead_topic(topic)
    end = end_offsets(settings, name)[0]
    where = TopicPartition(name, 0)
    consumer: KafkaConsumer = make_consumer(settings, group=GROUP)
    try:
        consumer.assign([where])
        at = consumer.committed(where) or 0
        if at > end:  # the topic is younger than the commit
            at = 0
        first = consumer.beginning_offsets([where])[where]
        consumer.seek(where, max(at, first))
        for record in read_up_to(consumer, {where: end}, give_up_s=settings.kafka_timeout_s):
            yield _decode(record)
    finally:
        consumer.close()


def _commit(settings: Settings, topic: str, position: int) -> None:
    where = TopicPartition(dead_topic(topic), 0)
    consumer: KafkaConsumer = make_consumer(settings, group=GROUP)
    try:
        consumer.assign([where])
        consumer.commit({where: OffsetAndMetadata(position, "", -1)})
    finally:
        consumer.close()


def _decode(record: Any) -> Dead:
    letter = orjson.loads(record.value)
    return Dead(
        topic=letter["topic"],
        partition=letter["partition"],
        offset=letter["offset"],
        reason=letter["reason"],
        key=record.key or b"",
        raw=base64.b64decode(letter["raw"]),
        cut_bytes=letter.get("cut_bytes", 0),
        at_ms=record.timestamp,
        position=record.offset,
    )
