"""Histories: whatever the batches, the result is the same, and never from the future."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.core.eventlog import Arrived, EventLog, events_table
from services.core.events import Event, EventType
from services.core.history import UserHistory, histories_as_of, joined, merge

LIMIT = 8
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 20),  # event time: ties and late ones
        st.sampled_from([EventType.VIEW, EventType.RATING, EventType.IMPRESSION, EventType.SKIP]),
        st.one_of(st.none(), st.floats(0, 5)),
    ),
    max_size=40,
)


def arrivals(events: Sequence[tuple[int, EventType, float | None]]) -> list[Arrived[Event]]:
    return [
        Arrived(
            record=Event(
                event_id=str(n),
                user_id="u",
                item_id=f"item {n}",
                type=kind,
                timestamp=1_000 + time,
                value=value,
            ),
            arrival_ms=5_000 + n,
            partition=0,
            offset=n,
        )
        for n, (time, kind, value) in enumerate(events)
    ]


def plain(history: UserHistory) -> UserHistory:
    """Without what as-of histories don't have, and with a NaN that equals itself."""
    values = tuple(-1.0 if math.isnan(value) else value for value in history.values)
    return replace(history, values=values, updated_ms=0, partition=-1, offset=-1)


def merged(events: Sequence[Arrived[Event]], *, cuts: Sequence[int] = ()) -> UserHistory:
    history = UserHistory(user_id="u")
    for first, last in zip([0, *cuts], [*cuts, len(events)], strict=True):
        history, _ = merge(history, events[first:last], limit=LIMIT, now_ms=0)
    return history


@given(events=EVENTS, cuts=st.lists(st.integers(0, 40), max_size=5), back=st.integers(0, 10))
def test_batches_and_replays_do_not_matter(
    events: Sequence[tuple[int, EventType, float | None]], cuts: list[int], back: int
) -> None:
    given_events = arrivals(events)
    cuts = sorted(min(cut, len(given_events)) for cut in cuts)
    whole = merged(given_events)
    assert plain(merged(given_events, cuts=cuts)) == plain(whole)
    replayed, duplicates = merge(whole, given_events[-back:], limit=LIMIT, now_ms=0)
    assert plain(replayed) == plain(whole)
    assert duplicates == 0
    times = whole.timestamps_ms
    assert list(times) == sorted(times)
    assert len(times) <= LIMIT


@given(events=EVENTS, before=st.integers(0, 22))
@hypothesis_settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_as_of_is_what_merging_the_earlier_events_gives(
    tmp_path: Path, events: Sequence[tuple[int, EventType, float | None]], before: int
) -> None:
    given_events = arrivals(events)
    log = EventLog(str(tmp_path))
    table = events_table(given_events).sort_by(
        [("timestamp", "ascending"), ("partition", "ascending"), ("offset", "ascending")]
    )
    at_ms = 1_000 + before
    found = histories_as_of(table, ["u", "nobody"], [at_ms, at_ms], limit=LIMIT)
    earlier = merged([one for one in given_events if one.record.timestamp < at_ms])
    assert plain(found[0]) == plain(earlier)
    assert found[1] == UserHistory(user_id="nobody")
    assert log.end() == {}


@given(events=EVENTS, cut=st.integers(0, 40), again=st.integers(0, 3))
def test_the_histories_of_two_parts_join_to_that_of_the_whole(
    events: list[tuple[int, EventType, float | None]], cut: int, again: int
) -> None:
    arrived = arrivals(events)
    older, newer = merged(arrived[:cut]), merged(arrived[max(0, cut - again) :])
    # Twice in the log, and once in the whole; unless the window of a part has lost sight of it.
    exact = older.n_events <= LIMIT and newer.n_events <= LIMIT
    both, whole = plain(joined(older, newer, limit=LIMIT)), plain(merged(arrived))
    assert both == whole if exact or not again else both.item_ids == whole.item_ids


def test_a_retried_event_with_another_offset_counts_once() -> None:
    one = arrivals([(5, EventType.VIEW, None)])[0]
    retry = replace(one, offset=9, arrival_ms=9_999)
    history, duplicates = merge(UserHistory(user_id="u"), [one, retry], limit=LIMIT, now_ms=7)
    assert duplicates == 1
    assert (history.n_events, history.offset, history.updated_ms) == (1, 9, 7)
    assert history.last_arrival_ms == one.arrival_ms


def test_features_as_of_an_event_do_not_contain_it() -> None:
    history = merged(arrivals([(5, EventType.VIEW, None), (2, EventType.VIEW, None)]))
    assert history.valid_from_ms == 1_006
