"""Who is in a trial, and how its arms are scored."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from services.core.registry import Registry
from services.core.trials import CANDIDATE, SERVING, Arm, Trial, score
from services.recommend.trial import LiveTrial
from tests import students

SPLIT = Trial(version=2, mode="split", percent=25, since_ms=5)
SHADOW = Trial(version=2, mode="shadow", percent=100, since_ms=5)


def test_the_same_users_are_in_it_and_more_of_them_as_it_is_raised() -> None:
    users = [f"user-{number}" for number in range(4_000)]
    few = {user for user in users if SPLIT.takes(user)}
    many = {u for u in users if Trial(version=2, mode="split", percent=50, since_ms=9).takes(u)}
    assert few < many
    assert len(few) == pytest.approx(1_000, rel=0.1)
    other = {u for u in users if Trial(version=3, mode="split", percent=25, since_ms=5).takes(u)}
    assert len(few & other) == pytest.approx(250, rel=0.3)
    with pytest.raises(ValueError, match="percent=0"):
        Trial(version=2, mode="split", percent=0, since_ms=5)


def log(*rows: tuple[str, str, str | dict[str, Any]]) -> pa.Table:
    """(user, type, item or context), in order."""
    columns: dict[str, list[Any]] = {
        "user_id": [user for user, _, _ in rows],
        "type": [kind for _, kind, _ in rows],
        "item_id": [what if isinstance(what, str) else what["items"][0] for _, _, what in rows],
        "context": [None if isinstance(what, str) else json.dumps(what) for _, _, what in rows],
        "partition": [0] * len(rows),
        "offset": list(range(len(rows))),
    }
    return pa.table(columns)


def test_a_list_is_answered_by_its_users_next_interaction() -> None:
    new, old = (
        {"items": ["a", "b"], "model_version": version, **SPLIT.arm(version == 2)}
        for version in (2, 1)
    )
    elsewhere = {"items": ["c"], "model_version": 1, "trial": "split-1-1", "arm": CANDIDATE}
    rows = log(
        ("u", "impression", new),
        ("v", "impression", old),
        ("u", "skip", "b"),  # no interaction
        ("v", "click", "c"),  # a miss
        ("u", "click", "b"),  # a hit
        ("u", "click", "a"),  # answers nothing: the list is answered
        ("v", "impression", old),
        ("v", "impression", elsewhere),  # another trial's, and the last that v has seen
        ("v", "click", "a"),
        ("w", "impression", new),  # never answered
    )
    backwards = rows.take(list(reversed(range(len(rows)))))
    assert score([backwards], SPLIT) == {SERVING: Arm(2, 1, 0), CANDIDATE: Arm(2, 1, 1)}


def test_a_shadow_is_judged_by_what_its_user_did_with_another_list() -> None:
    both = {"items": ["a", "b"], "model_version": 1, **SHADOW.unseen(["b", "c"])}
    rows = log(
        ("u", "impression", both),
        ("u", "view", "c"),
        ("u", "impression", both),
        ("u", "view", "b"),
    )
    assert score([rows[:3], rows[3:]], SHADOW) == {SERVING: Arm(2, 2, 1), CANDIDATE: Arm(2, 2, 2)}


def test_the_interval_is_wilsons() -> None:
    assert Arm(shown=200, answered=100, hits=10).interval() == pytest.approx(
        (0.0552, 0.1744), abs=1e-4
    )
    assert Arm().interval() is None


def test_what_is_tried_out_is_not_pruned(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    for _ in range(4):
        students.publish(registry, tmp_path)
    assert registry.trial("student") is None
    registry.begin_trial("student", SPLIT)
    assert registry.trial("student") == SPLIT
    assert registry.prune("student", 1) == [1, 3]
    registry.end_trial("student")
    registry.end_trial("student")
    assert registry.prune("student", 1) == [2]


def test_what_cannot_be_tried_out_is_not_fetched_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(str(tmp_path / "registry"))
    for _ in range(2):
        students.publish(registry, tmp_path)
    weights = Path(registry.uri, "student", "000002", "weights.safetensors")
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    registry.begin_trial("student", SPLIT)
    fetched = []
    fetch = Registry.fetch

    def counted(*given: Any) -> Path:
        fetched.append(given)
        return fetch(*given)

    monkeypatch.setattr(Registry, "fetch", counted)
    live = LiveTrial(registry, poll_s=60.0, exact_items=100)
    for _ in range(3):
        live.look()
    assert (len(fetched), live.running) == (1, None)

    weights.write_bytes(sound)
    monkeypatch.setattr("services.recommend.polling.RETRY_S", 0.0)
    live.look()
    assert live.running is not None and live.running.trial == SPLIT
    pointer = next(Path(registry.uri, "student").glob("*trial*"))
    pointer.write_bytes(b"{")  # nobody can tell what is tried out now: what was goes on
    live.look()
    assert live.running is not None and len(fetched) == 2
