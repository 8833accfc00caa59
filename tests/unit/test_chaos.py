"""The audit finds what it is there to find, and the producer's ledger tells the truth."""

import json
import threading
from itertools import islice
from pathlib import Path

import httpx

from services.core.eventlog import EPOCH_SPAN
from services.core.history import UserHistory
from services.local import rehearsal
from services.local.audit import (
    answered,
    learned_once,
    logged_once,
    newest_ledger,
    online_as_recomputed,
)
from services.local.load import BATCH_EVENTS, Producer, Request, events


def test_a_lost_or_doubled_event_breaks_the_promise() -> None:
    acknowledged = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert logged_once(acknowledged, ["c", "a", "b", "a stranger's"]).kept
    assert not logged_once(acknowledged, ["a", "b"]).kept
    assert not logged_once(acknowledged, ["a", "b", "c", "b"]).kept
    assert logged_once(acknowledged, ["a", "b"], lost_windows=[(2.5, 3.5)]).kept
    assert not logged_once(acknowledged, ["a"], lost_windows=[(2.5, 3.5)]).kept


def test_a_sequence_that_differs_breaks_the_promise() -> None:
    row = UserHistory(user_id="u", item_ids=("a",), values=(float("nan"),), event_keys=(7,))
    written = UserHistory(**{**vars(row), "updated_ms": 5, "partition": 2, "offset": 9})
    assert online_as_recomputed([written], [row]).kept
    assert not online_as_recomputed([UserHistory(user_id="u")], [row]).kept


def test_a_gap_or_an_overlap_of_what_was_learned_breaks_the_promise() -> None:
    assert learned_once({0: [[0, 10], [10, 25]], 1: [[0, 4]]}, {0: 25, 1: 4}).kept
    assert not learned_once({0: [[0, 10], [12, 25]]}, {0: 25}).kept  # a gap
    assert not learned_once({0: [[0, 10], [8, 25]]}, {0: 25}).kept  # learned twice
    assert not learned_once({0: [[0, 10]]}, {0: 25}).kept  # the end is missing
    assert not learned_once({0: [[0, 10]]}, {0: 10, 1: 3}).kept  # a whole partition is
    anew = [[0, 10], [EPOCH_SPAN, EPOCH_SPAN + 5]]
    assert learned_once({0: anew}, {0: EPOCH_SPAN + 5}).kept
    assert not learned_once({0: [[0, 10], [EPOCH_SPAN + 2, EPOCH_SPAN + 5]]}, {0: EPOCH_SPAN}).kept


def test_requests_that_fail_or_come_late_break_the_promise_unless_excused() -> None:
    good = [Request(at_s=10.0 + n, took_s=0.01, status=200) for n in range(999)]
    late = Request(at_s=5.0, took_s=2.0, status=200)
    down = Request(at_s=6.0, took_s=0.0, status=0)
    assert answered([*good, late], deadline_s=1, share=0.999).kept
    assert not answered([*good, late, down], deadline_s=1, share=0.999).kept
    assert answered([*good, late, down], deadline_s=1, share=0.999, excused=[(5.5, 6.5)]).kept
    assert not answered([], deadline_s=1, share=0.999).kept


def test_the_newest_checkpoints_ledger_of_all_workers_is_read(tmp_path: Path) -> None:
    for name, until in (("checkpoint_1", 5), ("checkpoint_2", 9)):
        for rank in range(2):
            own = tmp_path / "distill_student" / name / f"rank-{rank:05d}"
            own.mkdir(parents=True)
            (own / "own.json").write_text(json.dumps({"ledger": {str(rank): [[0, until]]}}))
    assert newest_ledger(str(tmp_path)) == {0: [[0, 9]], 1: [[0, 9]]}
    assert newest_ledger(str(tmp_path / "nowhere")) == {}


def test_the_producer_sends_a_refused_batch_again_and_books_only_what_was_acknowledged() -> None:
    received: list[list[str]] = []
    stop = threading.Event()

    def gateway(request: httpx.Request) -> httpx.Response:
        received.append([event["event_id"] for event in json.loads(request.content)])
        if len(received) == 4:
            stop.set()
        if len(received) == 2:
            raise httpx.ConnectError("killed")
        return httpx.Response({3: 503}.get(len(received), 202))

    with httpx.Client(transport=httpx.MockTransport(gateway), base_url="http://gateway") as http:
        producer = Producer(http, events(3), rate=1e6)
        producer.run(stop)
    ids = [event["event_id"] for event in islice(events(3), 2 * BATCH_EVENTS)]
    assert received == [ids[:BATCH_EVENTS], *[ids[BATCH_EVENTS:]] * 3]
    assert list(producer.acknowledged) == ids
    assert [one.status for one in producer.refused] == [0, 503]


def test_a_job_that_did_not_go_on_after_a_blow_breaks_a_promise() -> None:
    blow = rehearsal.Blow(
        name="killed",
        node="node-1",
        held=2,
        learning_s=31.0,
        teacher_s=None,
        teacher_resumed=0,
        nodes_alive=2,
    )
    distillation, teacher = rehearsal.promised([blow])
    assert distillation.kept
    assert distillation.found == "after 31 s"
    assert not teacher.kept
    assert teacher.found == "never"
