"""Requests and Kafka records that nobody would send on purpose. Pure; the same ones for a seed."""

import json
import random
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

from services.core.events import EVENTS, ITEMS, EventType

GATEWAY: Final = "gateway"
ANSWERS: Final = "answers"
CONSOLE: Final = "console"
RECOMMENDATIONS: Final = "/v1/recommendations"
MAX_DEPTH: Final = 3
CONSOLE_SHARE: Final = 0.05
SOUND_SHARE: Final = 0.3  # of records and bodies: nothing wrong with these
ODD_TEXTS: Final = (
    *("", " ", "\0", "\n", "a\r\nb", "../..", "a/b", "%2e%2e", "\u202e", "\ufeff", "é" * 100),
    *("\U0001f600", "x" * 256, "x" * 257, "x" * 20_000, "null", "NaN", "'; DROP TABLE", "{}"),
)
ODD_NUMBERS: Final = (
    *(0, -1, 1, 2**31, 2**53 + 1, 2**63, 10**30, 4_102_444_800_001, 1.5, -0.0, 5e-324, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
ODD_HOSTS: Final = (b"[", b"http://[", b"evil.example", b"\xff", b"::1", b"")
CONTENT_TYPES: Final = (
    *(b"application/json", b"application/x-ndjson", b"application/json; charset=utf-16"),
    *(b"text/plain", b"", b"multipart/form-data", b"\xff"),
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request to one of the servers."""

    server: str
    method: str
    path: str  # percent-encoded
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One Kafka record. Never a tombstone: what is forgotten can't be counted."""

    topic: str
    key: bytes | None
    value: bytes


def calls(seed: int) -> Iterator[Call]:
    """Requests without end, most of them for the gateway, a few for the console."""
    rng = random.Random(seed)
    while True:
        headers = [(b"content-type", rng.choice(CONTENT_TYPES))] if rng.random() < 0.8 else []
        if rng.random() < 0.05:
            headers.append((b"authorization", rng.choice([b"Bearer \xff", b"Basic Og==", b""])))
        if rng.random() < CONSOLE_SHARE:
            yield _to_console(rng, headers)
            continue
        kind = rng.random()
        if kind < 0.3:
            some = [_event(rng) for _ in range(rng.randrange(1, 4))]
            many = b"\n".join(_body(rng, one, unique="event_id") for one in some)
            yield Call(server=GATEWAY, method="POST", path="/v1/events", headers=headers, body=many)
        elif kind < 0.4:
            body = _body(rng, _item(rng))
            yield Call(server=GATEWAY, method="POST", path="/v1/items", headers=headers, body=body)
        elif kind < 0.5:
            path = f"/v1/items/{quote(_text(rng), safe='')}"
            body = _body(rng, {k: v for k, v in _item(rng).items() if k != "item_id"})
            yield Call(server=GATEWAY, method="PUT", path=path, headers=headers, body=body)
        elif kind < 0.55:
            path = f"/v1/users/fuzz-{quote(_text(rng), safe='')}"
            yield Call(server=GATEWAY, method="DELETE", path=path, headers=headers)
        elif kind < 0.65:
            yield Call(
                server=rng.choice([GATEWAY, ANSWERS]),
                method=rng.choice(["GET", "POST", "PUT", "PATCH", "OPTIONS", "HEAD", "DELETE"]),
                path=f"/{quote(_text(rng), safe='/')}",
                headers=headers,
                body=_body(rng, {}),
            )
        elif kind < 0.75:
            query = "&".join(
                f"{quote(name)}={quote(str(_value(rng, MAX_DEPTH)), safe='')[:2000]}"
                for name in rng.sample(["user_id", "n", "exclude", "categories", "colour"], 2)
            )
            path = f"{RECOMMENDATIONS}?{query}"
            yield Call(server=ANSWERS, method="GET", path=path, headers=headers)
        else:
            body = _body(rng, _question(rng))
            yield Call(
                server=ANSWERS, method="POST", path=RECOMMENDATIONS, headers=headers, body=body
            )


def _to_console(rng: random.Random, headers: list[tuple[bytes, bytes]]) -> Call:
    """All that it has but its stream, which does not end, and the teacher, who takes seconds."""
    headers = list(headers)
    if rng.random() < 0.2:
        name = rng.choice([b"host", b"origin", b"sec-fetch-site"])
        headers.append((name, rng.choice(ODD_HOSTS)))
    if rng.random() < 0.5:
        kind = rng.choice(["student", "teacher", _text(rng)])
        number = rng.choice([*ODD_NUMBERS, *range(6), "x" * 300])
        path = rng.choice(
            [
                *("", "api/status", "api/state", "api/jobs", "api/logs", "api/try/users"),
                f"api/history?seconds={quote(str(number))}",
                f"api/versions/{quote(kind, safe='')}/{quote(str(number))}",
                *(f"{base}/{quote(_text(rng), safe='/')}" for base in ("api/logs", "static")),
                f"api/jobs/{quote(_text(rng), safe='')}/log",
            ]
        )
        return Call(server=CONSOLE, method="GET", path=f"/{path}", headers=headers)
    path, sound = rng.choice(
        [
            ("versions", _change(rng)),
            ("try/answers", _question(rng)),
            ("try/click", {n: v for n, v in _event(rng).items() if n in ("user_id", "item_id")}),
        ]
    )
    body = _body(rng, sound)
    return Call(server=CONSOLE, method="POST", path=f"/api/{path}", headers=headers, body=body)


def records(seed: int) -> Iterator[Sent]:
    """Records without end, most of them for `events`. Every event has an id of its own."""
    rng = random.Random(seed)
    while True:
        topic = ITEMS if rng.random() < 0.2 else EVENTS
        sound = _item(rng) if topic == ITEMS else _event(rng)
        key = rng.choice([b"", None, b"\xff\x00", str(sound.get("user_id", "k")).encode()])
        value = _body(rng, sound, unique="event_id") or b"{"
        yield Sent(topic=topic, key=key, value=value)


def _event(rng: random.Random) -> dict[str, Any]:
    return {
        "event_id": f"fuzz-{rng.getrandbits(64):x}",
        "user_id": f"fuzz-{rng.randrange(200)}",
        "item_id": f"fuzz-item-{rng.randrange(300)}",
        "type": rng.choice(list(EventType)).value,
        "timestamp": int(time.time() * 1000) - rng.randrange(10**9),
    }


def _item(rng: random.Random) -> dict[str, Any]:
    return {
        "item_id": f"fuzz-item-{rng.randrange(300)}",
        "title": "".join(rng.choices(string.printable, k=12)),
        "categories": rng.sample(["a", "b", "c"], rng.randrange(4)),
    }


def _change(rng: random.Random) -> dict[str, Any]:
    return {
        "action": rng.choice(["promote", "roll_back", "release"]),
        "kind": rng.choice(["student", "teacher"]),
        "version": rng.randrange(5),
        "held": rng.choice([None, *range(1, 5)]),
    }


def _question(rng: random.Random) -> dict[str, Any]:
    return {
        "user_id": f"fuzz-{rng.randrange(250)}",
        "recent_items": [f"fuzz-item-{rng.randrange(400)}" for _ in range(rng.randrange(4))],
        "n": rng.randrange(1, 20),
    }


def _body(rng: random.Random, sound: dict[str, Any], *, unique: str = "") -> bytes:
    """The object as JSON, mostly with something wrong. The field `unique` stays as it is unless
    the bytes themselves are broken."""
    if rng.random() < SOUND_SHARE:
        return json.dumps(sound).encode()
    broken: Any = dict(sound)
    fields = [name for name in broken if name != unique]
    how = rng.randrange(5)
    if how == 0 and fields:
        broken[rng.choice(fields)] = _value(rng, 0)
    elif how == 1 and fields:
        del broken[rng.choice(fields)]
    elif how == 2:
        broken[rng.choice(["value", "context", "vector", "timestamp", _text(rng)])] = _value(rng, 0)
    elif how == 3:
        broken = _value(rng, 0)
    raw = bytearray(json.dumps(broken, ensure_ascii=rng.random() < 0.5).encode())
    if how == 4 or rng.random() < 0.1:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        if rng.random() < 0.3:
            del raw[rng.randrange(len(raw) + 1) :]
    return bytes(raw)


def _value(rng: random.Random, depth: int) -> Any:
    kinds = 4 if depth >= MAX_DEPTH else 7
    kind = rng.randrange(kinds)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice(ODD_NUMBERS)
    if kind in (2, 3):
        return _text(rng)
    if kind == 4:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {_text(rng): _value(rng, depth + 1) for _ in range(rng.randrange(4))}
    deep: Any = 0
    for _ in range(rng.choice([10, 150, 400])):
        deep = [deep]
    return deep


def _text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(ODD_TEXTS)
    return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x800)])) for _ in range(8))
