"""Kafka as the embedded broker speaks it, where it differs from what clients may expect."""

import time
from contextlib import closing
from pathlib import Path

import pytest
from kafka import TopicPartition

from services.core.errors import SettingsError, UnavailableError
from services.core.eventlog import EPOCH_SPAN, EventLog
from services.core.events import EVENTS
from services.core.kafka import (
    Publisher,
    describe,
    end_offsets,
    ensure_topics,
    lag,
    make_consumer,
    make_producer,
    resume_offsets,
)
from services.core.settings import Settings
from services.local import processes


def test_ends_and_lag_are_exact_after_every_batch(settings: Settings, fresh_kafka: str) -> None:
    own = settings.model_copy(update={"kafka_bootstrap": fresh_kafka})
    ensure_topics(own)
    ensure_topics(own)  # again changes nothing
    publisher = Publisher(own)
    total = 0
    for size in (1, 500, 3):
        publisher.publish(EVENTS, [(f"user {n}".encode(), b"x" * 100) for n in range(size)])
        total += size
        assert sum(end_offsets(own, EVENTS).values()) == total
        assert sum(lag(own).values()) == total
    publisher.close()
    assert set(end_offsets(own, EVENTS)) == set(range(own.partitions))


def test_a_consumer_that_is_behind_gives_the_broker_the_time_to_find_its_records(
    settings: Settings, fresh_kafka: str
) -> None:
    """The embedded broker lists all of a partition's batches for each fetch, and ends it after the
    wait, here so short that nothing is found."""
    own = settings.model_copy(update={"kafka_bootstrap": fresh_kafka, "partitions": 1})
    ensure_topics(own)
    partition, total = TopicPartition(EVENTS, 0), 6_000
    with closing(make_producer(own, batch_size=0, linger_ms=0, delivery_timeout_ms=120_000)) as out:
        sent = [out.send(EVENTS, b"%d" % n) for n in range(total)]  # a batch each
        for future in sent:
            future.get(timeout=120)
    with closing(make_consumer(own, fetch_max_wait_ms=1)) as consumer:
        consumer.assign([partition])
        consumer.seek(partition, 0)
        values: list[bytes] = []
        deadline = time.monotonic() + 60
        while len(values) < total and time.monotonic() < deadline:
            polled = consumer.poll(timeout_ms=100)
            values += [record.value for record in polled.get(partition, [])]
        assert values == [b"%d" % n for n in range(total)]
        # Patience would now only delay what arrives.
        assert not consumer.poll(timeout_ms=100)
        assert consumer._fetcher.config["fetch_max_wait_ms"] == 1


def test_resuming_goes_by_the_log_and_by_the_topic_s_incarnation(
    settings: Settings, tmp_path: Path
) -> None:
    port = processes.free_port()
    own = settings.model_copy(update={"kafka_bootstrap": f"127.0.0.1:{port}", "partitions": 2})
    log = EventLog(own.offline)
    seen = set()
    for epoch in range(2):
        broker = processes.Process(processes.broker(port), logs=tmp_path)
        try:
            broker.wait_ready()
            ensure_topics(own)
            begin = epoch * EPOCH_SPAN
            assert resume_offsets(own, log) == {0: begin, 1: begin}
            assert resume_offsets(own, log, [1]) == {1: begin}
            seen.add(describe(own, EVENTS).id)
        finally:
            broker.stop()
    assert len(seen) == 2


def test_no_kafka_is_an_error_with_the_fix_and_in_time(settings: Settings) -> None:
    nowhere = settings.model_copy(
        update={"kafka_bootstrap": f"127.0.0.1:{processes.free_port()}", "kafka_timeout_s": 0.5}
    )
    for action in (
        lambda: make_producer(nowhere),
        lambda: make_consumer(nowhere),
        lambda: ensure_topics(nowhere),
        lambda: Publisher(nowhere).publish(EVENTS, [(b"k", b"v")]),
    ):
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="REFLUX_KAFKA_TIMEOUT_S"):
            action()
        assert time.monotonic() - started < 3.0
    with pytest.raises(SettingsError, match="reflux up"):
        make_producer(settings.model_copy(update={"kafka_bootstrap": ""}))
