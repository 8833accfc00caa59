import json

import pytest

from services.ingest.batch import parse_events


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
    (rejected,) = parse_events([raw], arrival_ms=0, max_future_s=0).rejected
    assert rejected.value == shown
    json.dumps(rejected.model_dump(), allow_nan=False)
