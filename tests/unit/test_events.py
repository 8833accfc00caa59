import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidEventError
from services.core.eventlog import Arrived, events_table
from services.core.events import (
    EVENTS,
    Event,
    EventType,
    Item,
    dead_letter,
    decode_event,
    decode_item,
    encode,
)
from services.core.kafka import MAX_RECORD_BYTES

NOW_MS = 1_750_000_000_000

ids = st.text(min_size=1, max_size=256).filter(lambda text: text.isprintable())
events = st.builds(
    Event,
    event_id=ids,
    user_id=ids,
    item_id=ids,
    type=st.sampled_from(EventType),
    timestamp=st.integers(0, NOW_MS),
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    context=st.none() | st.dictionaries(st.text(), st.integers(-(2**63), 2**64 - 1) | st.text()),
)


def raw(**changes: object) -> bytes:
    event = {
        "event_id": "e1",
        "user_id": "u1",
        "item_id": "i1",
        "type": "click",
        "timestamp": NOW_MS,
        **changes,
    }
    return json.dumps({k: v for k, v in event.items() if v != "absent"}).encode()


@given(events)
def test_what_is_encoded_is_decoded_and_can_be_logged(event: Event) -> None:
    assert decode_event(encode(event), arrival_ms=NOW_MS, max_future_s=0) == event
    events_table([Arrived(record=event, arrival_ms=NOW_MS, partition=0, offset=0)])


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_clear_error(data: bytes) -> None:
    try:
        decode_event(data, arrival_ms=NOW_MS, max_future_s=0)
    except InvalidEventError as error:
        assert error.fix


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"type": "buy"}, "type", "'purchase'"),
        ({"user_id": ""}, "user_id", "at least 1"),
        ({"user_id": "absent"}, "user_id", "required"),
        ({"timestamp": NOW_MS * 1000}, "timestamp", "less than or equal"),
        ({"timestamp": NOW_MS + 301_000}, "timestamp", "after arrival"),
        ({"value": "five"}, "value", "number"),
        ({"value": True}, "value", "number"),
        ({"timestamp": "5"}, "timestamp", "number"),
        ({"schema_version": True}, "schema_version", "number"),
        ({"colour": "red"}, "colour", "context"),
        ({"context": {"a": [{"b": 2**64}]}}, "context", "64 bits"),
        ({"context": {"a": -(2**63) - 1}}, "context", "64 bits"),
        ({"context": {"a": float("nan")}}, "context", "finite"),
        ({"schema_version": 2}, "schema_version", "less than or equal to 1"),
    ],
)
def test_a_bad_event_names_field_and_fix(changes: dict[str, object], field: str, word: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        decode_event(raw(**changes), arrival_ms=NOW_MS, max_future_s=300)
    assert caught.value.field == field
    assert word in caught.value.fix


def test_impressions_and_skips_are_no_interactions() -> None:
    kinds = {kind for kind in EventType if _event(kind).is_interaction}
    assert kinds == set(EventType) - {EventType.IMPRESSION, EventType.SKIP}


def test_items_travel_the_same_way() -> None:
    item = Item(item_id="i1", title="Heat (1995)", categories=["Action"], vector=[0.5, 1.0])
    decode = partial(decode_item, arrival_ms=1_000, max_future_s=60)
    assert decode(encode(item)) == item.model_copy(update={"timestamp": 1_000})
    dated = item.model_copy(update={"timestamp": 61_000})
    assert decode(encode(dated)) == dated
    with pytest.raises(InvalidEventError, match=r"timestamp.*61001.*at most 60 s after arrival"):
        decode(encode(item.model_copy(update={"timestamp": 61_001})))
    with pytest.raises(InvalidEventError, match="item_id"):
        decode(b'{"title": "no id"}')


def _event(kind: EventType) -> Event:
    return Event(event_id="e", user_id="u", item_id="i", type=kind, timestamp=0)


def test_a_dead_letter_fits_into_a_record_whatever_died() -> None:
    letter = dead_letter(
        b"\xff" * 1_048_000, reason="x" * 10**6, topic=EVENTS, partition=0, offset=5
    )
    assert len(letter) < MAX_RECORD_BYTES
    assert json.loads(letter)["cut_bytes"] == 348_000
