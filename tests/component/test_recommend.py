"""The answers over HTTP, with the real Redis, Feast and Kafka, and students that come and go."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from services.core.registry import Registry
from services.core.settings import Settings
from services.local import processes
from tests import students
from tests.answering import ask, ids, serving, until, write_history
from tests.students import N_ITEMS, SCORE_STEP, item


def test_answers(live: Settings, promote: Callable[[], int]) -> None:
    promote()
    write_history(live, "answers", item(1), item(2))
    with serving(live) as client:
        answer = ask(client, user_id="answers", n=5)
        assert (answer["user_id"], answer["fallback"], answer["degraded"]) == (
            "answers",
            None,
            False,
        )
        assert (answer["model_version"], answer["teacher_version"]) == (1, 3)
        assert 0 <= answer["features_age_s"] < 60
        known = client.get("/v1/users/answers", params={"n": 1}).json()
        assert (known["n_events"], [e["item_id"] for e in known["events"]]) == (2, [item(2)])
        assert (known["events"][0]["title"], known["events"][0]["value"]) == ("v1", None)
        assert client.get("/v1/users/who%2Fis that").json()["events"] == []
        assert len(answer["items"]) == 5 and not {item(1), item(2)} & set(ids(answer))
        assert answer["items"][0]["title"] == "v1" and answer["items"][0]["categories"]
        by_url = client.get("/v1/recommendations", params={"user_id": "answers", "n": 5}).json()
        assert by_url["items"] == answer["items"]

        # One event more: another answer, without the item.
        write_history(live, "answers", item(1), item(2), ids(answer)[0])
        assert ids(answer)[0] not in ids(ask(client, user_id="answers", n=N_ITEMS))

        horror = ask(client, user_id="answers", n=100, categories=["Horror"], exclude=[item(5)])
        assert ids(horror) and item(5) not in ids(horror)
        assert all(shown["categories"] == ["Horror"] for shown in horror["items"])
        everything = ask(client, user_id="answers", n=100, include_seen=True)
        assert len(everything["items"]) == N_ITEMS

        trending = ask(client, user_id="nobody-knows", n=2)
        assert (ids(trending), trending["fallback"]) == ([item(7), item(8)], "trending")
        assert trending["features_age_s"] is None
        session = ask(client, recent_items=[item(7), "unheard-of"], exclude=["me-neither"])
        assert session["fallback"] is None and item(7) not in ids(session)
        assert session["ignored"] == ["unheard-of", "me-neither"]

        metrics = client.get("/metrics").text
        assert 'reflux_answers_total{fallback="none",status="200"}' in metrics
        assert "reflux_answer_seconds_bucket" in metrics
        assert "reflux_model_version 1.0" in metrics
        assert "reflux_weight_freshness_seconds_count 2.0" in metrics


def test_after_the_rehearsal_no_answer_waits_for_the_compiler() -> None:
    command = [sys.executable, "-m", "tests.component.rehearsed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_a_batch_answers_each_user_as_alone_and_in_order(
    live: Settings, promote: Callable[[], int]
) -> None:
    promote()
    user_ids = [f"batch-{at}" for at in range(130)]  # more than are read together
    for at in (0, 7, 120):
        write_history(live, user_ids[at], item(at % N_ITEMS), item(3))
    with serving(live) as client:
        url = "/v1/recommendations:batch"
        wanted = {"n": 3, "exclude": [item(7), "unheard-of"], "categories": ["drama"]}
        response = client.post(url, json={"user_ids": user_ids, **wanted})
        assert response.status_code == 200, response.text
        answers = response.json()["answers"]
        assert [answer["user_id"] for answer in answers] == user_ids
        assert len({answer["request_id"] for answer in answers}) == len(user_ids)
        assert [a["user_id"] for a in answers if not a["fallback"]] == [
            user_ids[at] for at in (0, 7, 120)
        ]
        for at in (0, 1, 7, 120):
            alone = ask(client, user_id=user_ids[at], **wanted)
            own = {"request_id", "features_age_s"}
            assert {k: v for k, v in answers[at].items() if k not in own} == {
                k: v for k, v in alone.items() if k not in own
            }
        for bad in (None, [], ["x"] * 1_001, [""]):
            refused = client.post(url, json={"user_ids": bad})
            assert refused.status_code == 422
            assert refused.json()["detail"][0]["field"].startswith("user_ids")
        unknown = client.post(url, json={"user_ids": ["x"], "users": []}).json()["detail"][0]
        assert "user_ids" in unknown["fix"]
        schema = client.get("/openapi.json").json()["paths"][url]["post"]
        assert "user_ids" in str(schema["requestBody"]) and "200" in schema["responses"]
        assert (
            'reflux_answers_total{fallback="batch",status="200"} 130.0'
            in client.get("/metrics").text
        )


def test_a_bad_request_is_told_the_field_the_value_and_the_fix(
    live: Settings, promote: Callable[[], int]
) -> None:
    promote()
    with serving(live) as client:
        for bad, field, value, fix in [
            ({"n": 0}, "n", 0, "greater than or equal to 1"),
            ({"n": 101}, "n", 101, "less than or equal to 100"),
            ({"exclude": ["a", ""]}, "exclude.1", "", "at least 1 character"),
            ({"user": "42"}, "user", "42", "user_id"),
        ]:
            response = client.post("/v1/recommendations", json=bad)
            assert response.status_code == 422
            (problem,) = response.json()["detail"]
            assert (problem["field"], problem["value"]) == (field, value)
            assert fix in problem["fix"]
        assert "must be JSON" in client.post("/v1/recommendations", content=b"{").text
        by_url = client.get("/v1/recommendations", params={"n": "many"})
        assert by_url.status_code == 422
        assert by_url.json()["detail"][0]["field"] == "n"
        assert client.post("/v1/recommendations", content=b" " * 2**21).status_code == 413
        schema = client.get("/openapi.json").json()
        post = schema["paths"]["/v1/recommendations"]["post"]
        body = post["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["properties"]) >= {"user_id", "recent_items", "n", "exclude", "categories"}
        assert client.get("/docs").status_code == 200


def test_before_the_first_promotion_it_says_try_again(
    live: Settings, promote: Callable[[], int]
) -> None:
    with serving(live) as client:
        assert client.get("/healthz").status_code == 200
        for response in (client.get("/readyz"), client.post("/v1/recommendations", json={})):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "no student has been promoted" in response.json()["detail"][0]["fix"]
        promote()
        until(lambda: client.get("/readyz").status_code == 200)
        assert ask(client)["model_version"] == 1


def test_swaps_under_fire_mix_no_versions_and_fail_no_request(
    live: Settings, promote: Callable[[], int]
) -> None:
    promote()
    write_history(live, "fire", item(1), item(2), item(3))
    answered: list[int] = []
    stop = threading.Event()
    wrong: list[Any] = []

    def hammer(url: httpx.URL) -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            while not stop.is_set():
                response = client.post("/v1/recommendations", json={"user_id": "fire", "n": 3})
                answer = response.json()
                version = answer.get("model_version")
                answered.append(version)
                whole = response.status_code == 200 and all(
                    shown["title"] == f"v{version}"
                    and abs(shown["score"] - version * SCORE_STEP) < SCORE_STEP / 2
                    for shown in answer["items"]
                )
                if not whole:
                    wrong.append(answer)

    def is_answering(version: int) -> bool:
        return version in answered[-50:]

    with serving(live) as client:
        threads = [threading.Thread(target=hammer, args=(client.base_url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            version = promote()
            until(partial(is_answering, version))
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(answered) > 100 and answered[-1] == 9


def test_what_cannot_serve_leaves_the_last_good_version(
    live: Settings, promote: Callable[[], int], registry: Registry
) -> None:
    promote()
    with serving(live) as client:
        version = promote()
        until(lambda: ask(client)["model_version"] == 2)

        def failed() -> bool:
            return "reflux_model_swaps_failed_total{" in client.get("/metrics").text

        weights = Path(live.registry) / "student/000003/weights.safetensors"
        hidden = registry.uri + "/student-away"
        version = students.publish(registry, live.home, seed=2)
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        registry.promote("student", version, "looks fine")
        until(failed)
        assert 'error="CorruptVersionError"' in client.get("/metrics").text
        assert ask(client)["model_version"] == 2
        # The whole registry goes away, and comes back.
        Path(live.registry, "student").rename(hidden)
        time.sleep(0.2)
        assert ask(client)["model_version"] == 2
        Path(hidden).rename(Path(live.registry, "student"))
        assert registry.roll_back("student") == 2
        registry.promote("student", 1, "by hand", hold=True)
        until(lambda: ask(client)["model_version"] == 1)


def test_a_replica_that_starts_into_trouble_answers_with_what_is_left(
    live: Settings, promote: Callable[[], int], registry: Registry
) -> None:
    promote(), promote(), promote()
    for version in (2, 3):
        path = Path(live.registry, f"student/{version:06d}/catalog.parquet")
        path.write_bytes(path.read_bytes()[:-1])
    away = live.model_copy(update={"redis": f"127.0.0.1:{processes.free_port()}"})
    with serving(away) as client:
        answer = ask(client, user_id="early", recent_items=[item(2)])
        assert (answer["model_version"], answer["degraded"]) == (1, True)
        assert answer["fallback"] is None
        metrics = client.get("/metrics").text
        assert 'reflux_model_swaps_failed_total{error="CorruptVersionError"} 1.0' in metrics
        promote()
        until(lambda: ask(client)["model_version"] == 4)


def test_without_the_online_store_it_answers_in_time_and_says_so(
    live: Settings, promote: Callable[[], int], tmp_path: Path
) -> None:
    promote()
    port = processes.free_port()
    redis = processes.Process(processes.redis(port, data=tmp_path / "redis"), logs=tmp_path)
    try:
        redis.wait_ready()
        own = live.model_copy(update={"redis": f"127.0.0.1:{port}", "feature_timeout_s": 1.0})
        write_history(own, "robust", item(1))
        with serving(own) as client:
            assert not ask(client, user_id="robust")["degraded"]
            for disturb, recent, fallback in [
                (signal.SIGSTOP, [item(2)], None),
                (signal.SIGKILL, [], "trending"),
            ]:
                os.kill(redis.pid, disturb)
                time.sleep(1.1)  # past the cool-down: this request meets the store itself
                # In time: a stopped Redis says nothing for ever, and the client waits for 10 s.
                answer = ask(client, user_id="robust", recent_items=recent)
                assert (answer["degraded"], answer["fallback"]) == (True, fallback)
                assert "without the history" in answer["reason"]
                assert ids(answer)
            redis.stop()
            redis = processes.Process(redis.command, logs=tmp_path)
            redis.wait_ready()
            until(lambda: not ask(client, user_id="robust")["degraded"])
    finally:
        redis.stop()
