"""Poison, dead letters, users to be forgotten, and an online store that lost everything."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import redis as redis_client
from kafka import TopicPartition

from services.core.eventlog import EventLog
from services.core.events import EVENTS, ITEMS, Item, encode
from services.core.features import FeatureStore
from services.core.history import UserHistory
from services.core.kafka import Publisher, lag, make_consumer
from services.core.settings import Settings
from services.ingest import rebuild as rebuild_module
from services.ingest import worker as worker_module
from services.ingest.dead import dead_letters, replay
from services.ingest.flush import FLUSH_BYTES, HELD_FLUSHES, Flush
from services.ingest.metrics import Metrics
from services.ingest.online import Online
from services.ingest.reading import Reading
from services.local import processes
from tests.component.test_gateway import served
from tests.component.test_worker import (
    comparable,
    event,
    from_log,
    has_caught_up,
    own,  # noqa: F401
    publish,
    wait_for,
    working,
)


@pytest.fixture
def alone(own: Settings, tmp_path: Path) -> Iterator[tuple[Settings, processes.Process]]:  # noqa: F811
    """Kafka, Redis and files that nobody else uses."""
    port = processes.free_port()
    redis = processes.Process(processes.redis(port, data=tmp_path / "redis"), logs=tmp_path)
    try:
        redis.wait_ready()
        yield own.model_copy(update={"redis": f"127.0.0.1:{port}"}), redis
    finally:
        redis.stop()


def test_poison_goes_to_the_dead_letters_and_back_once_the_cause_is_gone(
    own: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = "trouble-poison"
    features = FeatureStore(own)
    write_users = features.write_users

    def allergic(rows: list[UserHistory]) -> None:
        if any("item 13" in row.item_ids for row in rows):
            raise ValueError("no thirteens")
        write_users(rows)

    monkeypatch.setattr(features, "write_users", allergic)
    # No `Event` holds such a number, but a producer may send it.
    too_large = encode(event(7, user=user, context={"n": "?"})).replace(b'"?"', b"%d" % 10**30)
    events = [event(n, user=user) for n in range(20) if n != 7]
    with working(own, features) as worker:
        publish(own, events)
        publisher = Publisher(own)
        publisher.publish(EVENTS, [(user.encode(), too_large)])
        publisher.close()
        wait_for(lambda: has_caught_up(own))
        assert worker.metrics.poison._value.get() == 1
        letters = {letter.raw: letter for letter in dead_letters(own)}
        assert letters.keys() == {encode(event(13, user=user)), too_large}
        assert "no thirteens" in letters[encode(event(13, user=user))].reason
        assert "64 bits" in letters[too_large].reason

        monkeypatch.undo()
        assert replay(own) == 2
        wait_for(lambda: features.read_users([user])[0].n_events == 19)
        wait_for(lambda: has_caught_up(own))
        assert [letter.raw for letter in dead_letters(own)] == [too_large]
    assert [comparable(features.read_users([user])[0])] == from_log(own, [user])
    assert len(EventLog(own.offline).read()) == 19


def test_a_forgotten_user_is_nowhere_on_disk(
    alone: tuple[Settings, processes.Process], tmp_path: Path
) -> None:
    settings, _ = alone
    features = FeatureStore(settings)
    users = ["trouble", "trouble\n"]  # which differ in no URL that is read carelessly
    keyed = settings.model_copy(update={"log_flush_s": 0.05})
    with working(keyed, features), served(keyed) as gateway:
        for n in range(30):  # several files, merged and not yet removed ones among them
            publish(keyed, [event(n, user=user) for user in users])
            time.sleep(0.06)
        wait_for(lambda: has_caught_up(keyed))
        assert found_on_disk(tmp_path, users[1])
        assert gateway.delete("/v1/users/trouble%0A").status_code == 202
        wait_for(lambda: features.read_users(users[1:])[0].n_events == 0)
        wait_for(lambda: has_caught_up(keyed))
        wait_for(lambda: not found_on_disk(tmp_path, users[1]), timeout_s=120)
        log = EventLog(keyed.offline).read()
        assert set(log["user_id"].to_pylist()) == {users[0]} and len(log) == 30
        assert features.read_users(users)[0].n_events == 30

        publish(keyed, [event(99, user=users[1])])  # a new user of that name
        wait_for(lambda: features.read_users(users[1:])[0].n_events == 1)
        wait_for(lambda: has_caught_up(keyed))
    assert [comparable(row) for row in features.read_users(users)] == from_log(keyed, users)


def test_a_log_that_cannot_be_written_is_tried_again_and_features_stay_fresh(
    own: Settings,  # noqa: F811
) -> None:
    user = "trouble-disk"
    settings = own.model_copy(update={"log_flush_s": 0.1})
    features = FeatureStore(settings)
    offline, aside = Path(settings.offline), Path(f"{settings.offline}-aside")
    with working(settings, features) as worker:
        publish(settings, [event(0, user=user)])
        wait_for(lambda: has_caught_up(settings))
        offline.rename(aside)
        offline.touch()  # no folder: whatever is written there fails
        publish(settings, [event(n, user=user) for n in range(1, 20)])
        wait_for(lambda: features.read_users([user])[0].n_events == 20)
        wait_for(lambda: worker.metrics.flush_failures._value.get() >= 1)
        assert sum(lag(settings).values()) == 19
        offline.unlink()
        aside.rename(offline)
        wait_for(lambda: has_caught_up(settings))
    assert [comparable(features.read_users([user])[0])] == from_log(settings, [user])
    history = pq.read_table(offline / "user_history")
    assert max(history["n_events"].to_pylist()) == 20


def test_records_that_only_make_dead_letters_are_not_held_without_end(
    own: Settings,  # noqa: F811
) -> None:
    away = own.model_copy(
        update={
            "kafka_bootstrap": f"{processes.LOOPBACK}:{processes.free_port()}",
            "kafka_timeout_s": 0.2,
            "log_flush_events": 10,
        }
    )
    metrics = Metrics()
    online = Online(FeatureStore(own), metrics, history_events=own.history_events)
    flush = Flush(away, {EVENTS: EventLog(own.offline)}, online, metrics)
    many = Reading(partition=0, first=0, next=50, dead=[(b"key", b"letter")] * 50)
    assert not flush.attempt({TopicPartition(EVENTS, 0): many})
    assert flush.holds_enough({TopicPartition(EVENTS, 0): many})
    large = Reading(partition=0, first=0, next=1, n_bytes=HELD_FLUSHES * FLUSH_BYTES)
    assert flush.holds_enough({TopicPartition(EVENTS, 0): large})
    flush.close()


def test_looking_for_a_lost_store_loses_no_commit(
    own: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "COMMIT_AGAIN_S", 3600.0)
    settings = own.model_copy(update={"log_flush_s": 0.5})
    with working(settings, FeatureStore(settings)):
        for n in range(4):
            publish(settings, [event(n, user="trouble-commit")])
            wait_for(lambda: has_caught_up(settings))


def test_whoever_reads_the_log_meets_no_forgotten_user_even_before_it_is_purged(
    settings: Settings,
) -> None:
    from services.core.eventlog import Arrived, events_table
    from services.core.forgetting import Tombstone

    log = EventLog(settings.offline)
    arrived = [
        Arrived(record=event(n, user=user), arrival_ms=n, partition=0, offset=2 * n + which)
        for n in range(3)
        for which, user in enumerate(["a", "b"])
    ]
    log.append(events_table(arrived))
    log.forget(Tombstone(user_id="b", partition=0, offset=4))
    assert log.read(columns=["offset"])["offset"].to_pylist() == [0, 2, 4, 5]
    late = Tombstone(user_id="a", partition=0, offset=6)  # its own span is not in the log yet
    log.forget(late)
    assert log.purge() == 2
    assert log.read(columns=["offset"])["offset"].to_pylist() == [5]
    assert log.end() == {0: 6}


def found_on_disk(folder: Path, text: str) -> list[Path]:
    """Files that hold the text, compressed or not."""
    found = []
    for path in folder.rglob("*"):
        try:
            raw = path.read_bytes() if path.is_file() else b""
            written = (text.encode(), json.dumps(text)[1:-1].encode())
            if any(text in raw for text in written) or _in_table(path, text):
                found.append(path)
        except FileNotFoundError:  # compacted meanwhile
            continue
    return found


def _in_table(path: Path, text: str) -> bool:
    if path.suffix != ".parquet":
        return False
    table = pq.read_table(path)
    names = [field.name for field in table.schema if str(field.type) == "string"]
    return any(pc.any(pc.match_substring(table[name], text)).as_py() for name in names)


def test_an_online_store_that_lost_everything_is_filled_from_the_log(
    alone: tuple[Settings, processes.Process],
) -> None:
    settings, _ = alone
    users = [f"trouble-lost-{n}" for n in range(9)]
    features = FeatureStore(settings)
    store = redis_client.Redis(port=int(settings.redis.split(":")[1]))

    def send(first: int, last: int) -> None:
        publish(settings, [event(n, user=users[n % 9]) for n in range(first, last)])

    def all_there(n: int) -> bool:
        rows = features.read_users(users)
        return sum(row.n_events for row in rows) == n and has_caught_up(settings)

    with working(settings, features) as worker:
        publisher = Publisher(settings)
        item = Item(item_id="item 1", title="One", text="long")
        publisher.publish(ITEMS, [(b"item 1", encode(item))])
        publisher.close()
        send(0, 300)
        wait_for(lambda: all_there(300))
        wait_for(lambda: features.read_items(["item 1"])[0].n_events == 1)
        store.flushall()  # while the worker runs, and events keep coming
        send(300, 330)
        wait_for(lambda: all_there(330))
        wait_for(lambda: features.read_items(["item 1"])[0].n_events == 1)
        assert features.read_items(["item 1"])[0].title == "One"
        assert worker.metrics.rebuilt._value.get() >= 9
    assert [comparable(row) for row in features.read_users(users)] == from_log(settings, users)

    store.flushall()  # and while none runs
    with working(settings, features):
        wait_for(lambda: all_there(330))
        send(330, 340)
        wait_for(lambda: all_there(340))
    assert [comparable(row) for row in features.read_users(users)] == from_log(settings, users)


def test_a_rebuild_that_takes_long_keeps_its_partitions(
    alone: tuple[Settings, processes.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, _ = alone
    users = [f"trouble-slow-{n}" for n in range(9)]
    features = FeatureStore(settings)
    store = redis_client.Redis(port=int(settings.redis.split(":")[1]))
    moved: list[Iterable[TopicPartition]] = []
    revoked, write_users = worker_module.Worker.on_partitions_revoked, features.write_users

    def noted(worker: worker_module.Worker, partitions: Iterable[TopicPartition]) -> None:
        moved.append(partitions)
        revoked(worker, partitions)

    def slowly(rows: Sequence[UserHistory]) -> None:
        time.sleep(0.6)
        write_users(rows)

    monkeypatch.setattr(worker_module.Worker, "on_partitions_revoked", noted)
    impatient = partial(make_consumer, max_poll_interval_ms=3_000)
    monkeypatch.setattr(worker_module, "make_consumer", impatient)
    with working(settings, features) as worker:
        publish(settings, [event(n, user=users[n % 9]) for n in range(90)])
        wait_for(lambda: has_caught_up(settings))
        monkeypatch.setattr(rebuild_module, "ROWS_AT_ONCE", 1)
        monkeypatch.setattr(features, "write_users", slowly)
        moved.clear()
        store.flushall()
        wait_for(lambda: worker.metrics.rebuilt._value.get() == 9)
        publish(settings, [event(90, user=users[0])])
        wait_for(lambda: has_caught_up(settings))
        assert not moved
    assert [comparable(row) for row in features.read_users(users)] == from_log(settings, users)


def test_an_online_store_that_came_back_old_is_brought_up_to_date(
    alone: tuple[Settings, processes.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MARK_EVERY_S", 0.1)
    monkeypatch.setattr(rebuild_module, "EVENTS_READ", 20)  # several portions
    monkeypatch.setattr(rebuild_module, "ROWS_AT_ONCE", 2)
    settings, _ = alone
    users = [f"trouble-old-{n}" for n in range(9)]
    features = FeatureStore(settings)
    store = redis_client.Redis(port=int(settings.redis.split(":")[1]))

    def marked() -> int:
        marks = store.mget(store.keys("reflux:filled_until:events:*"))
        return sum(int(mark.split()[0]) for mark in marks)

    def old(key: bytes) -> bytes:
        return store.get(key).split()[0] + b" a run before"

    def all_there(n: int) -> bool:
        rows = features.read_users(users)
        return sum(row.n_events for row in rows) == n and has_caught_up(settings)

    with working(settings, features) as worker:
        publish(settings, [event(n, user=users[n % 9]) for n in range(300)])
        wait_for(lambda: marked() == 300)
        monkeypatch.setattr(worker_module, "MARK_EVERY_S", 3600.0)
        then = {key: store.dump(key) for key in store.scan_iter()}
        publish(settings, [event(n, user=users[n % 4]) for n in range(300, 400)])
        wait_for(lambda: all_there(400))
        publisher = Publisher(settings)
        publisher.publish(EVENTS, [(users[8].encode(), None)])
        publisher.close()
        wait_for(lambda: not features.read_users(users[8:])[0].n_events)
        wait_for(lambda: len(EventLog(settings.offline).read()) == 400 - 33)
        wait_for(lambda: not EventLog(settings.offline).wishes())
        with store.pipeline() as pipe:  # what a restart does to a Redis that saves now and then
            for key, value in then.items():
                pipe.restore(key, 0, value, replace=True)
            for key in store.keys("reflux:filled_until:*"):
                pipe.set(key, old(key))
            pipe.execute()
        publish(settings, [event(n, user=users[n % 4]) for n in range(400, 410)])
        wait_for(lambda: worker.metrics.rebuilt._value.get() >= 4)
        wait_for(lambda: all_there(410 - 33))
        assert worker.metrics.rebuilt._value.get() == 4  # the others were not written again
    assert [comparable(row) for row in features.read_users(users)] == from_log(settings, users)
