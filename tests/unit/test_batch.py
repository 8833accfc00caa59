import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.events import EVENTS
from services.ingest.batch import parse, split

NUMBERS = st.integers() | st.sampled_from([2**63, 2**64, 10**30, 1e308]) | st.floats()
VALUES = st.none() | NUMBERS | st.text() | st.lists(NUMBERS, max_size=2)
CHANGES = st.dictionaries(st.sampled_from(["value", "context", "timestamp", "type"]), VALUES)
EVENT = {"event_id": "1", "user_id": "2", "item_id": "3", "type": "view", "timestamp": 4}


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b'{"event_id": NaN}', "nan"),
        (b'{"event_id": [1e999]}', "[inf]"),
        (b'{"event_id": 7}', 7),
        (b'{"event_id": ' + b"7" * 300 + b"}", "7" * 200 + "..."),
    ],
)
def test_what_stood_there_can_be_answered_in_json(raw: bytes, shown: object) -> None:
    (rejected,) = parse(EVENTS, [raw], arrival_ms=0, max_future_s=0).rejected
    assert rejected.value == shown
    json.dumps(rejected.model_dump(), allow_nan=False)


@given(st.lists(CHANGES | st.builds(lambda value: {"context": {"a": value}}, VALUES), max_size=3))
def test_an_array_takes_what_its_records_alone_would_be(changes: list[dict[str, Any]]) -> None:
    records = [json.dumps(EVENT | change).encode() for change in changes]
    array = b"[" + b",".join(records) + b"]"
    together, alone = (
        parse(EVENTS, raw, arrival_ms=10, max_future_s=0)
        for raw in (split(array, content_type="application/json"), records)
    )
    assert together.valid == alone.valid
    assert [r.model_dump() for r in together.rejected] == [r.model_dump() for r in alone.rejected]
