"""Reading Kafka by positions that only the checkpoint moves, across a broker that lost its log."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import recipes
from ray_jobs.peers import Peers
from ray_jobs.stream import EventStream, Received
from ray_jobs.warm_up import first_state
from services.core.eventlog import EPOCH_SPAN, Arrived, EventLog, events_table, items_table
from services.core.events import EVENTS, ITEMS, Event, EventType, Item, encode
from services.core.kafka import describe, ensure_topics, make_producer
from services.core.settings import Settings


def send(settings: Settings, ids: Sequence[str]) -> list[Arrived[Event]]:
    ensure_topics(settings)
    events = [
        Event(event_id=i, user_id=f"u{i}", item_id="i", type=EventType.VIEW, timestamp=1_000)
        for i in ids
    ]
    with closing(make_producer(settings)) as producer:
        sent = [producer.send(EVENTS, key=e.user_id.encode(), value=encode(e)) for e in events]
        producer.send(EVENTS, key=b"u", value=b"no event").get(timeout=30)
        where = [future.get(timeout=30) for future in sent]
    return [
        Arrived(record=e, arrival_ms=w.timestamp, partition=w.partition, offset=w.offset)
        for e, w in zip(events, where, strict=True)
    ]


def drain(stream: EventStream, last: str, n: int) -> list[str]:
    """User ids, until `last` and at least `n` have come."""
    users: list[str] = []
    for _ in range(100):
        received: Received = stream.poll(max_events=7, timeout_s=0.2)
        users += received.user_ids
        if last in users and len(users) >= n:
            break
    return sorted(users)


def settings_of(bootstrap: str, home: Path) -> Settings:
    return Settings(home=home, kafka_bootstrap=bootstrap, partitions=2)


def test_it_goes_on_where_the_positions_say_and_poison_is_passed_over(
    fresh_kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(fresh_kafka, tmp_path / "home")
    send(settings, ["a", "b", "c"])
    with closing(EventStream(settings, {0: 0, 1: 0})) as stream:
        assert drain(stream, "uc", 3) == ["ua", "ub", "uc"]
        stream.poll(max_events=10, timeout_s=0.5)
        positions = dict(stream.positions)
    assert sum(positions.values()) == 4  # the poison's place is behind us too
    assert "1 records can't be learned" in caplog.text
    send(settings, ["d"])
    with closing(EventStream(settings, positions)) as stream:
        assert drain(stream, "ud", 1) == ["ud"]
    with closing(EventStream(settings, {0: 0, 1: 0}, rank=1, world=2)) as share:
        assert set(share.positions) == {1}


def test_a_partition_that_the_topic_has_got_since_is_read_from_its_start(
    fresh_kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(fresh_kafka, tmp_path / "home")
    ids = [str(number) for number in range(10)]
    assert {one.partition for one in send(settings, ids)} == {0, 1}
    with monkeypatch.context() as before:  # the embedded broker can't add one
        before.setattr(
            "ray_jobs.stream.describe", lambda *given: describe(*given)._replace(partitions=[0])
        )
        stream = EventStream(settings, {})
        assert set(stream.positions) == {0}
    with closing(stream):
        stream.check_topic()
        assert len(drain(stream, "u9", len(ids))) == len(ids)


def test_what_kafka_no_longer_has_comes_from_the_log_and_else_is_told(
    fresh_kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(fresh_kafka, tmp_path / "home").model_copy(update={"partitions": 1})
    arrived = send(settings, ["a", "b", "c", "d"])
    EventLog(settings.offline).append(events_table(arrived[:2]))
    with closing(EventStream(settings, {0: 1})) as stream:
        # The embedded broker keeps everything: as if its retention had removed the first three.
        stream._consumer.beginning_offsets = lambda where: dict.fromkeys(where, 3)
        stream._open()
        received = stream.poll(max_events=7, timeout_s=0.2)
        assert received.user_ids == ["ub"]
        assert not received.rejoined
        skipped = stream.poll(max_events=7, timeout_s=0.2)
        assert skipped.skipped == {0: (2, 3)}
        assert skipped.rejoined == {0}
        assert "1 records from 2 on are in neither" in caplog.text
        assert drain(stream, "ud", 1) == ["ud"]


class Told(Peers):
    """Worker 0, which notes what it tells, or another one, which takes its word for it."""

    def __init__(self, rank: int, said: list[Any]) -> None:
        super().__init__(rank, 2)
        self._said = said

    def gather(self, value: Any) -> list[Any]:
        if self.rank == 0:
            self._said.append(value)
        return [self._said[-1]]


def test_workers_begin_with_one_catalog_though_the_log_grows(
    fresh_kafka: str, tmp_path: Path
) -> None:
    settings = settings_of(fresh_kafka, tmp_path / "home")
    log, items = EventLog(settings.offline), EventLog(settings.offline, ITEMS)
    log.append(events_table(send(settings, ["a"])))
    catalogs, said = [], list[Any]()
    for rank, item_id in enumerate(("one", "other")):
        state = first_state(settings, recipes.smoke_cpu(), Told(rank, said))
        catalogs.append(state.catalog.to_table())
        item = Item(item_id=item_id, title=item_id, timestamp=1_000)
        items.append(
            items_table([Arrived(record=item, arrival_ms=1_000, partition=0, offset=rank)])
        )
    assert catalogs[0].equals(catalogs[1])


def test_a_topic_created_anew_is_noticed_and_read_from_its_start(
    another_kafka: str, fresh_kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    before = settings_of(fresh_kafka, home)
    arrived = send(before, ["a", "b", "c"])
    positions = {0: 0, 1: 0}
    with closing(EventStream(before, positions)) as stream:
        assert stream.positions == positions
    log = EventLog(before.offline)
    for partition in (0, 1):
        part = [a for a in arrived if a.partition == partition]
        if part:
            log.append(events_table(part))

    # Another broker, with the same offline log: as if the first had restarted without its data.
    after = before.model_copy(update={"kafka_bootstrap": another_kafka})
    ensure_topics(after)
    with closing(EventStream(after, positions)) as stream:
        assert "created anew" in caplog.text
        # First what only the offline log still has.
        assert drain(stream, "uc", 3) == ["ua", "ub", "uc"]
        for _ in stream.positions:  # at most a poll each, from one topic to the other
            stream.poll(max_events=7, timeout_s=0.2)
        assert all(at == EPOCH_SPAN for at in stream.positions.values())
        send(after, ["reset-d"])
        assert "ureset-d" in drain(stream, "ureset-d", 1)
