"""What was shown goes back to Kafka as impressions, and other versions are tried on live users."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from services.core.events import EVENTS, decode_event
from services.core.kafka import ensure_topics, make_consumer
from services.core.registry import Registry
from services.core.settings import Settings
from services.core.trials import CANDIDATE, SERVING, Trial
from services.local import processes
from tests import students
from tests.answering import ask, ids, serving, until
from tests.students import item


def test_what_was_shown_to_a_user_becomes_an_impression(
    live: Settings, promote: Callable[[], int]
) -> None:
    promote()
    ensure_topics(live)
    with serving(live) as client:
        ask(client, recent_items=[item(1)])
        answer = ask(client, user_id="impressed", n=3)
        until(lambda: 'reflux_impressions_total{outcome="sent"} 1.0' in client.get("/metrics").text)
    (record,) = impressions_of(live, "impressed", at_least=1)
    event = decode_event(record.value, arrival_ms=record.timestamp, max_future_s=60)
    assert (event.event_id, event.item_id) == (answer["request_id"], ids(answer)[0])
    assert event.context == {"items": ids(answer), "model_version": 1, "fallback": "trending"}


def impressions_of(settings: Settings, *user_ids: str, at_least: int) -> list[Any]:
    """Kafka's records of these users' impressions, once there are so many, in order."""
    keys = {user_id.encode() for user_id in user_ids}
    found: list[Any] = []

    def enough() -> bool:
        for records in consumer.poll(timeout_ms=200).values():
            found.extend(
                record
                for record in records
                if record.key in keys and json.loads(record.value)["type"] == "impression"
            )
        return len(found) >= at_least

    with closing(make_consumer(settings)) as consumer:
        consumer.subscribe([EVENTS])
        until(enough)
    return sorted(found, key=lambda record: (record.partition, record.offset))


def test_another_version_is_tried_on_some_users_or_unseen(
    live: Settings, registry: Registry, promote: Callable[[], int], tmp_path: Path
) -> None:
    promote()
    students.publish(registry, tmp_path, seed=2)
    ensure_topics(live)
    split = Trial(version=2, mode="split", percent=50, since_ms=1)
    inside = next(f"trial-{n}" for n in count() if split.takes(f"trial-{n}"))
    outside = next(f"trial-{n}" for n in count() if not split.takes(f"trial-{n}"))

    asked = count()

    def version_for(user_id: str) -> int:
        next(asked)
        return int(ask(client, user_id=user_id, recent_items=[item(1)])["model_version"])

    with serving(live) as client:
        assert version_for(inside) == 1
        registry.begin_trial("student", split)
        until(lambda: version_for(inside) == 2)
        assert version_for(outside) == 1
        assert ask(client, recent_items=[item(1)])["model_version"] == 1  # a session is in no arm
        registry.begin_trial("student", replace(split, mode="shadow"))
        until(lambda: version_for(inside) == 1)
        assert version_for(outside) == 1
        registry.end_trial("student")

    arms: dict[tuple[str, int, str], set[bool]] = {}
    for record in impressions_of(live, inside, outside, at_least=next(asked)):
        told = json.loads(record.value)["context"]
        mark = told.get("trial", "none").partition("-")[0]
        about = (record.key.decode(), told["model_version"], mark)
        arms.setdefault(about, set()).add("shadow" in told)
        assert told.get("arm", SERVING) == (CANDIDATE if told["model_version"] == 2 else SERVING)
        if "shadow" in told:
            assert told["shadow"] != told["items"]  # seeds differ
    assert arms[inside, 1, "none"] == {False}
    assert arms[inside, 2, "split"] == arms[outside, 1, "split"] == {False}
    assert arms[inside, 1, "shadow"] == {True}


def test_kafka_away_costs_impressions_and_nothing_else(
    live: Settings, promote: Callable[[], int]
) -> None:
    promote()
    nowhere = f"127.0.0.1:{processes.free_port()}"
    away = live.model_copy(update={"kafka_bootstrap": nowhere, "kafka_timeout_s": 2.0})
    with serving(away) as client:
        began_s = time.monotonic()
        for _ in range(20):
            ask(client, user_id="unimpressed")
        assert time.monotonic() - began_s < 20  # 40 if each waited for Kafka
        until(lambda: 'outcome="failed"' in client.get("/metrics").text)
