"""The gateway over real HTTP and a real broker."""

import json
import os
import signal
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import uvicorn
from kafka import TopicPartition

from services.core.events import EVENTS, ITEMS
from services.core.kafka import end_offsets, make_consumer
from services.core.settings import Settings
from services.ingest.gateway import create_app
from services.local import processes


@contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    config = uvicorn.Config(create_app(settings), port=processes.free_port(), log_level="warning")
    server = uvicorn.Server(config)
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{config.port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def gateway(settings: Settings) -> Iterator[httpx.Client]:
    with served(settings) as client:
        yield client


def event(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"gateway-{number}",
        "user_id": "gateway-user",
        "item_id": "an item",
        "type": "view",
        "timestamp": 1_700_000_000_000 + number,
        **changes,
    }


def read_back(settings: Settings, topic: str, since: dict[int, int]) -> list[dict[str, Any]]:
    """What the topic got since those offsets, keyed as a user's producer would key it."""
    wanted = sum(end_offsets(settings, topic).values()) - sum(since.values())
    consumer = make_consumer(settings)
    partitions = {number: TopicPartition(topic, number) for number in since}
    consumer.assign(list(partitions.values()))
    for number, offset in since.items():
        consumer.seek(partitions[number], offset)
    found: list[dict[str, Any]] = []
    while len(found) < wanted:
        for records in consumer.poll(timeout_ms=100).values():
            found += [{**json.loads(r.value), "key": r.key.decode()} for r in records]
    consumer.close()
    return found


def test_one_event_an_array_and_ndjson_reach_kafka_keyed_by_user(
    gateway: httpx.Client, settings: Settings
) -> None:
    gateway.post("/v1/events", json=event(0)).raise_for_status()
    since = end_offsets(settings, EVENTS)
    one = gateway.post("/v1/events", json=event(1))
    array = gateway.post("/v1/events", json=[event(2), event(3, context={"page": "home"})])
    lines = "\n".join(json.dumps(event(n)) for n in range(4, 7)) + "\n\n"
    ndjson = gateway.post(
        "/v1/events", content=lines, headers={"content-type": "application/x-ndjson"}
    )
    assert [(r.status_code, r.json()["accepted"]) for r in (one, array, ndjson)] == [
        (202, 1),
        (202, 2),
        (202, 3),
    ]
    found = read_back(settings, EVENTS, since)
    assert [record["event_id"] for record in found] == [f"gateway-{n}" for n in range(1, 7)]
    assert {record["key"] for record in found} == {"gateway-user"}
    assert found[2]["context"] == {"page": "home"}


def test_invalid_events_are_explained_one_by_one_and_the_valid_ones_accepted(
    gateway: httpx.Client, settings: Settings
) -> None:
    in_a_day = int(time.time() * 1000) + 86_400_000
    bad = [
        event(11, type="stare"),
        event(12, user_id=""),
        {k: v for k, v in event(13).items() if k != "item_id"},
        event(14, timestamp=in_a_day),
        event(15, color="red"),
        event(16, context={"long": "x" * 1_000_000}),
        "not an object",
    ]
    answer = gateway.post("/v1/events", json=[event(10), *bad, event(17)])
    assert answer.status_code == 422
    body = answer.json()
    assert body["accepted"] == 2
    assert [(r["index"], r["field"]) for r in body["rejected"]] == [
        (1, "type"),
        (2, "user_id"),
        (3, "item_id"),
        (4, "timestamp"),
        (5, "color"),
        (6, ""),
        (7, ""),
    ]
    assert body["rejected"][0]["value"] == "stare"
    assert "'view'" in body["rejected"][0]["fix"]
    assert "context" in body["rejected"][4]["fix"]
    metrics = gateway.get("/metrics").text
    assert "reflux_gateway_accepted_total 2.0" in metrics
    assert 'reflux_gateway_rejected_total{reason="invalid"} 7.0' in metrics


@pytest.mark.parametrize("body", ["", "{", '[{"event_id": 1},', "[1, 2", "null"])
def test_a_body_that_is_no_json_is_a_422(gateway: httpx.Client, body: str) -> None:
    answer = gateway.post("/v1/events", content=body)
    assert answer.status_code == 422
    assert answer.json()["accepted"] == 0
    assert answer.json()["rejected"][0]["index"] == 0


def test_items_by_put_and_by_batch(gateway: httpx.Client, settings: Settings) -> None:
    film = "AC/DC: Live (1992)"
    path = "/v1/items/" + urllib.parse.quote(film, safe="")
    gateway.put(path, json={"title": film}).raise_for_status()
    since = end_offsets(settings, ITEMS)
    assert gateway.put(path, json={"title": film, "categories": ["Music"]}).status_code == 202
    assert gateway.put(path, json={"item_id": "another"}).json()["rejected"][0]["field"] == (
        "item_id"
    )
    batch = [{"item_id": "b", "timestamp": 5}, {"item_id": "c", "vector": [0.5]}]
    assert gateway.post("/v1/items", json=batch).json() == {"accepted": 2, "rejected": []}
    found = {record["item_id"]: record for record in read_back(settings, ITEMS, since)}
    assert found[film]["categories"] == ["Music"]
    assert found[film]["timestamp"] > 1_700_000_000_000  # as of its arrival
    assert found["b"]["timestamp"] == 5
    assert found["c"]["vector"] == [0.5]


def test_too_large_a_body_or_batch_is_a_413(settings: Settings) -> None:
    limits = {"max_body_bytes": 2_048, "max_batch_events": 3}
    with served(settings.model_copy(update=limits)) as gateway:
        assert gateway.post("/v1/events", json=[event(n) for n in range(4)]).status_code == 413
        answer = gateway.post("/v1/events", json=event(1, context={"x": "y" * 2_048}))
        assert answer.status_code == 413
        assert "REFLUX_MAX_BODY_BYTES" in answer.json()["detail"]


def test_past_its_bound_the_gateway_says_429_and_loses_nothing_it_took(
    settings: Settings, tmp_path: Path
) -> None:
    port = processes.free_port()
    own = settings.model_copy(
        update={
            "kafka_bootstrap": f"127.0.0.1:{port}",
            "kafka_timeout_s": 3.0,
            "max_held_bytes": 5 * 2**16,
        }
    )
    broker = processes.Process(processes.broker(port), logs=tmp_path)
    try:
        broker.wait_ready()
        with served(own) as gateway, ThreadPoolExecutor(40) as pool:
            assert gateway.post("/v1/events", json=event(0)).status_code == 202
            os.kill(broker.pid, signal.SIGSTOP)
            started = time.monotonic()
            posts = [pool.submit(gateway.post, "/v1/events", json=event(n)) for n in range(1, 41)]
            time.sleep(1.0)
            refused = gateway.post("/v1/events", json=event(41))
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert gateway.get("/healthz").status_code == 200
            answers = Counter(post.result().status_code for post in posts)
            assert time.monotonic() - started < own.kafka_timeout_s + 2
            assert answers == {503: 20, 429: 20}  # 16 KiB each
            os.kill(broker.pid, signal.SIGCONT)
            taken = [0]
            for n in range(50, 90):
                answer = gateway.post("/v1/events", json=event(n))
                if answer.status_code == 202:
                    taken.append(n)
            assert taken[-1] == 89
            metrics = gateway.get("/metrics").text
            assert "reflux_gateway_held_bytes 0.0" in metrics
            found = {r["event_id"] for r in read_back(own, EVENTS, dict.fromkeys(range(4), 0))}
            assert {f"gateway-{n}" for n in taken} <= found
    finally:
        os.kill(broker.pid, signal.SIGCONT)
        broker.stop()


def test_kafka_down_is_a_503_in_time_and_the_gateway_comes_back(
    settings: Settings, tmp_path: Path
) -> None:
    port = processes.free_port()
    own = settings.model_copy(
        update={"kafka_bootstrap": f"127.0.0.1:{port}", "kafka_timeout_s": 3.0}
    )
    broker = processes.Process(processes.broker(port), logs=tmp_path)
    try:
        broker.wait_ready()
        with served(own) as gateway:
            assert gateway.post("/v1/events", json=event(1)).status_code == 202
            assert gateway.get("/readyz").status_code == 200
            broker.stop()
            started = time.monotonic()
            answer = gateway.post("/v1/events", json=event(2))
            assert time.monotonic() - started < 4.5
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert gateway.get("/readyz").status_code == 503
            assert gateway.get("/healthz").status_code == 200

            # The embedded broker has lost its topics, its log and the producer's identity.
            for number in (3, 4):
                broker = processes.Process(processes.broker(port), logs=tmp_path)
                broker.wait_ready()
                assert gateway.post("/v1/events", json=event(number)).status_code == 202
                assert sum(end_offsets(own, EVENTS).values()) == 1
                if number == 3:
                    broker.stop()
    finally:
        broker.stop()


def test_the_api_page_carries_the_contract(gateway: httpx.Client) -> None:
    document = gateway.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert set(schemas["Event"]["required"]) >= {"event_id", "user_id", "timestamp"}
    assert "impression" in schemas["EventType"]["enum"]
    body = document["paths"]["/v1/events"]["post"]["requestBody"]["content"]
    example = body["application/json"]["examples"]["one"]["value"]
    assert gateway.post("/v1/events", json=example).status_code == 202
    assert gateway.get("/docs").status_code == 200
