"""The whole loop on ML-100K, as its users meet it: by the `reflux` command and over HTTP."""

import json
from typing import Any

from services.core.registry import Registry
from services.local.client import new_event
from tests.e2e.conftest import HISTORY_EVENTS, Running, distilled_from, replay

LIVE_EVENTS = 4_000


def test_the_answer_follows_the_users_events(learned: Running) -> None:
    user = "a brand-new user"
    unknown = ask(learned, user)
    assert unknown["fallback"] == "trending"
    assert unknown["items"]
    chosen = unknown["items"][0]["item_id"]
    sent = learned.client.send(
        json.dumps(new_event(user_id=user, item_id=chosen, type_="click")).encode()
    )
    assert sent["accepted"] == 1
    learned.wait_until(lambda: ask(learned, user)["fallback"] is None, "a personal answer")
    personal = ask(learned, user)
    assert chosen not in [item["item_id"] for item in personal["items"]]
    assert personal["features_age_s"] < 60
    assert all(item["title"] for item in personal["items"])


def test_live_events_make_new_versions_that_serve(learned: Running) -> None:
    before = learned.look()
    replay(learned, "--skip", str(HISTORY_EVENTS), "--events", str(LIVE_EVENTS), "--rate", "400")
    wanted = before.metrics["stream.events"] + LIVE_EVENTS
    learned.wait_until(
        lambda: learned.look().metrics["stream.events"] >= wanted, "every event scored and learned"
    )
    after = learned.look()
    # The click of another test may have been under way before.
    assert after.metrics["stream.events"] - wanted <= 1
    assert before.student_version is not None and after.student_version is not None
    assert after.student_version > before.student_version
    assert ask(learned, "anyone")["model_version"] >= before.student_version
    for model in ("student", "teacher", "stale_teacher", "frozen_student", "popularity"):
        assert 0 < after.metrics[f"stream.{model}.ndcg@10"] < 1
    assert after.metrics["window.student.ndcg@10"] > after.metrics["window.popularity.ndcg@10"]


def test_a_refreshed_teacher_is_taken_up_without_a_restart(learned: Running) -> None:
    first, job = distilled_from(learned), student_jobs(learned)
    learned.reflux("teacher", "refresh", "--wait", timeout_s=300)
    skip = HISTORY_EVENTS + LIVE_EVENTS
    replay(learned, "--skip", str(skip), "--events", "1000", "--rate", "200")
    learned.wait_until(lambda: distilled_from(learned) != first, "the new teacher's student")
    assert distilled_from(learned) == learned.look().teacher_version
    assert student_jobs(learned) == job


def test_a_rollback_by_hand_holds_until_it_is_released(learned: Running) -> None:
    learned.reflux("models", "rollback", "student")
    # Not compared with what served a moment ago: a newer one may have been promoted in between.
    serving = Registry(learned.settings.registry).serving("student")
    held, reason = serving.version, serving.history[-1].reason
    assert serving.held and held < int(reason.removeprefix("rolled back from "))
    published = learned.look().student_published or 0
    skip = HISTORY_EVENTS + LIVE_EVENTS + 1000
    replay(learned, "--skip", str(skip), "--events", "1000", "--rate", "200")
    learned.wait_until(
        lambda: (learned.look().student_published or 0) > published, "a newer version"
    )
    assert learned.look().student_version == held
    learned.wait_until(
        lambda: learned.client.recommend(user_id=None)["model_version"] == held, "it answers"
    )
    learned.reflux("models", "release", "student")
    replay(learned, "--skip", str(skip + 1000), "--events", "1000", "--rate", "200")
    learned.wait_until(lambda: learned.look().student_version != held, "a newer one serving")


def test_status_tells_how_it_goes(learned: Running) -> None:
    status = json.loads(learned.reflux("status", "--json"))
    assert all(status["processes"].values())
    assert status["feature_lag_events"] == 0
    assert status["feature_freshness_p50_ms"] > 0
    assert status["weight_freshness_p50_s"] > 0
    assert status["answers"] > 0
    assert "REFLUX_KAFKA_BOOTSTRAP" in learned.reflux("doctor")


def ask(running: Running, user: str) -> dict[str, Any]:
    return running.client.recommend(user_id=user)


def student_jobs(running: Running) -> str:
    return running.reflux("student", "status")
