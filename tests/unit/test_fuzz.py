from itertools import islice

from services.core.errors import InvalidEventError
from services.core.events import EVENTS, decode_event
from services.local.fuzz import Call, Sent, calls, records


def _is_sound(record: Sent) -> bool:
    try:
        decode_event(record.value, arrival_ms=10**13, max_future_s=0)
    except InvalidEventError:
        return False
    return True


def test_a_seed_always_gives_the_same_and_both_sound_and_broken_ones() -> None:
    first = list(islice(records(1), 500))
    events = [record for record in first if record.topic == EVENTS]
    assert 100 < sum(map(_is_sound, events)) < len(events) - 100
    assert len({record.value for record in first}) > 400
    assert [r.key for r in first] == [r.key for r in islice(records(1), 500)]
    asked: list[Call] = list(islice(calls(1), 500))
    assert {call.server for call in asked} == {"gateway", "answers", "console"}
    assert all(call.path.isascii() and " " not in call.path for call in asked)
