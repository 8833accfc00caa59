"""Our features through plain Feast, as a Feast user reads them, and the time machine's honesty."""

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from services.core.eventlog import EventLog
from services.core.events import ITEMS, Event, EventType, Item, encode
from services.core.features import REPOSITORY, FeatureStore
from services.core.history import UserHistory
from services.core.kafka import Publisher
from services.core.settings import Settings
from services.ingest.worker import Worker
from tests.component.test_worker import START_MS, event, has_caught_up, publish, wait_for, working

USER = "feast-user"
DAY_MS = 86_400_000


def at(timestamp_ms: int) -> datetime:
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC)


def work_off(settings: Settings, features: FeatureStore, events: list[Event]) -> None:
    """Each event is flushed before the next one comes: a row of the offline store each."""
    with working(settings, features):
        for one in events:
            publish(settings, [one])
            wait_for(lambda: has_caught_up(settings))


def test_plain_feast_applies_our_repository_on_a_fresh_clone(tmp_path: Path) -> None:
    from feast import FeatureStore as Feast

    repository = tmp_path / "feature_repo"
    shutil.copytree(REPOSITORY, repository)
    subprocess.run(
        [sys.executable, "-m", "feast.cli.cli", "apply"],
        cwd=repository,
        env={k: v for k, v in os.environ.items() if not k.startswith("REFLUX_")},
        check=True,
        timeout=300,
    )
    views = {view.name: view for view in Feast(repo_path=str(repository)).list_feature_views()}
    assert set(views) == {"user_history", "item_stats"}
    offline = tmp_path / ".reflux" / "offline" / "user_history" / "*.parquet"
    assert views["user_history"].batch_source.path == str(offline)


def test_plain_feast_reads_what_the_worker_wrote_and_never_the_future(
    settings: Settings, fresh_kafka: str
) -> None:
    from feast import FeatureStore as Feast

    own = settings.model_copy(update={"kafka_bootstrap": fresh_kafka})
    features = FeatureStore(own)
    features.apply()
    features.apply()  # again changes nothing
    publisher = Publisher(own)
    publisher.publish(ITEMS, [(b"item 2", encode(Item(item_id="item 2", title="Two")))])
    publisher.close()
    work_off(own, features, [event(n, user=USER) for n in range(4)])

    plain = Feast(fs_yaml_file=own.home / "feature_store.yaml")
    online = plain.get_online_features(
        features=["user_history:item_ids", "user_history:values", "user_history:n_events"],
        entity_rows=[{"user_id": USER}],
    ).to_dict()
    assert online["item_ids"] == [["item 0", "item 1", "item 2", "item 3"]]
    assert online["values"] == [[0.0, 1.0, 2.0, 3.0]]
    assert online["n_events"] == [4]

    times = [START_MS + n * 1_000 for n in range(5)]
    before = historical(plain, times)
    assert before == [None, *(tuple(f"item {i}" for i in range(n)) for n in range(1, 5))]
    exact = [row.item_ids for row in features.as_of([USER] * 5, times)]
    assert exact == [ids or () for ids in before]

    # An event from the future of all those times, and one that arrives late.
    planted = [
        event(9, user=USER, timestamp=START_MS + DAY_MS, item_id="planted"),
        event(8, user=USER, timestamp=START_MS + DAY_MS - 1, item_id="late"),
    ]
    work_off(own, features, planted)
    EventLog(own.offline).compact()
    assert historical(plain, times) == before
    assert [row.item_ids for row in features.as_of([USER] * 5, times)] == exact
    assert historical(plain, [START_MS + DAY_MS + 1])[0][-2:] == ("late", "planted")
    (now,) = features.as_of([USER], [START_MS + DAY_MS + 1])
    assert now.item_ids[-2:] == ("late", "planted")
    (row,) = features.read_users([USER])
    assert isinstance(row, UserHistory)
    assert row.item_ids == now.item_ids

    items = plain.get_online_features(
        features=["item_stats:title", "item_stats:n_events"], entity_rows=[{"item_id": "item 2"}]
    ).to_dict()
    assert items["title"] == ["Two"]


def historical(plain: Any, times_ms: list[int]) -> list[Any]:
    entities = pd.DataFrame(
        {"user_id": [USER] * len(times_ms), "event_timestamp": [at(t) for t in times_ms]}
    )
    joined = plain.get_historical_features(
        entity_df=entities, features=["user_history:item_ids"]
    ).to_df()
    joined = joined.sort_values("event_timestamp")
    return [None if ids is None else tuple(ids) for ids in joined["item_ids"]]


def test_popularity_of_items_counts_in_event_time_online_and_offline(
    settings: Settings, fresh_kafka: str
) -> None:
    from feast import FeatureStore as Feast

    own = settings.model_copy(update={"kafka_bootstrap": fresh_kafka})
    features = FeatureStore(own)
    features.apply()
    ages_days: dict[str, list[float]] = {"new": [0, 0.5], "week": [1, 6.9, 7], "month": [29, 31]}
    events = [
        event(
            n,
            user=f"feast-{n}",
            item_id=f"feast-{name}",
            timestamp=START_MS + 40 * DAY_MS - int(age * DAY_MS),
        )
        for n, (name, age) in enumerate((k, a) for k, ages in ages_days.items() for a in ages)
    ]
    shown = event(99, user="feast-x", item_id="feast-new", type=EventType.IMPRESSION)
    with working(own, features) as worker:
        publish(own, [*events, shown])
        wait_for(lambda: features.read_items(["feast-month"])[0].n_events == 2)
        wait_for(lambda: rolled_up(worker) >= 7)
    found = features.read_items(["feast-new", "feast-week", "feast-month"])
    counts = [(i.popularity_1d, i.popularity_7d, i.popularity_30d, i.n_events) for i in found]
    assert counts == [(2, 2, 2, 2), (0, 2, 3, 3), (0, 0, 1, 2)]
    plain = Feast(fs_yaml_file=own.home / "feature_store.yaml")
    newest_ms = START_MS + 40 * DAY_MS
    rows = plain.get_historical_features(
        entity_df=pd.DataFrame(
            {
                "item_id": ["feast-week"] * 2,
                "event_timestamp": [at(newest_ms), at(newest_ms + 1)],
            }
        ),
        features=["item_stats:popularity_30d"],
    ).to_df()
    found_30d = rows.sort_values("event_timestamp")["popularity_30d"].tolist()
    assert pd.isna(found_30d[0])
    assert found_30d[1] == 3


def rolled_up(worker: Worker) -> int:
    return sum(item.n_events for item in worker._roll_up._written.values())
