"""The event contract: what producers send, and nothing else.

JSON on the topic `events`, keyed by `user_id`, so that one user's events stay in order; item
metadata on `items`, keyed by `item_id`. What breaks the contract goes to `<topic>.dead` with the
reason and its original bytes. Event time (`timestamp`, the producer's clock) is kept apart from
arrival time (the Kafka record's timestamp).
"""

import base64
import json
import math
from enum import StrEnum
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from services.core.errors import InvalidEventError

EVENTS: Final = "events"
ITEMS: Final = "items"
SCHEMA_VERSION: Final = 1
MAX_TIMESTAMP_MS: Final = 4_102_444_800_000  # 2100-01-01: catches micro- and nanoseconds
MAX_DEAD_BYTES: Final = 700_000  # in base64 a third more; a record has at most a million
MAX_REASON_CHARS: Final = 1_000
INTEGERS: Final = range(-(2**63), 2**64)  # what the log's JSON can hold


def _is_number(value: object) -> object:
    if isinstance(value, bool | str):  # pydantic would take true for 1, and "5" for 5
        raise PydanticCustomError("number_type", "must be a JSON number")
    return value


def _has_sound_numbers(context: dict[str, Any]) -> dict[str, Any]:
    """What JSON's readers take for a number is more than the log can write: 10**30 it refuses,
    and NaN would come back as null."""
    rest: list[object] = [context]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, float) and not math.isfinite(value):
            raise PydanticCustomError("number_finite", "must have finite numbers only")
        elif isinstance(value, int) and value not in INTEGERS:
            raise PydanticCustomError(
                "number_size", "must have integers of 64 bits only; send larger ones as strings"
            )
    return context


Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Whole = Annotated[int, BeforeValidator(_is_number)]
Real = Annotated[float, BeforeValidator(_is_number)]
Context = Annotated[dict[str, Any], AfterValidator(_has_sound_numbers)]
_ID: Final[TypeAdapter[str]] = TypeAdapter(Id)


class EventType(StrEnum):
    VIEW = "view"
    CLICK = "click"
    CART = "cart"
    PURCHASE = "purchase"
    RATING = "rating"
    LIKE = "like"
    SKIP = "skip"
    IMPRESSION = "impression"


# They enter histories and are learned: the user chose the item.
INTERACTIONS: Final = tuple(
    kind.value for kind in EventType if kind not in (EventType.IMPRESSION, EventType.SKIP)
)


class _Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Event(_Contract):
    """One thing a user did (or, for an impression, was shown)."""

    event_id: Id = Field(description="unique; a retry with the same id counts once")
    user_id: Id
    item_id: Id = Field(description="of an impression: the first item shown; all: context.items")
    type: EventType
    timestamp: Whole = Field(ge=0, le=MAX_TIMESTAMP_MS, description="event time, UTC milliseconds")
    value: Real | None = Field(None, description="rating, price, ...")
    context: Context | None = Field(
        None, description="anything else; numbers finite, integers of at most 64 bits"
    )
    schema_version: Whole = Field(SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)

    @property
    def is_interaction(self) -> bool:
        return self.type.value in INTERACTIONS


class Item(_Contract):
    """What is known of an item before anyone has touched it."""

    item_id: Id
    title: str | None = Field(None, max_length=1024)
    categories: list[Annotated[str, StringConstraints(min_length=1, max_length=128)]] = Field(
        default_factory=list, max_length=64
    )
    text: str | None = Field(None, max_length=65_536)
    vector: list[Real] | None = Field(None, max_length=4096)
    timestamp: Whole = Field(0, ge=0, le=MAX_TIMESTAMP_MS, description="of this metadata, ms")
    schema_version: Whole = Field(SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)


def dead_topic(topic: str) -> str:
    return f"{topic}.dead"


def encode(record: Event | Item) -> bytes:
    """The record's JSON, without the fields that were not given."""
    return record.model_dump_json(exclude_none=True).encode()


def decode_event(raw: bytes, *, arrival_ms: int, max_future_s: float) -> Event:
    """Parse and check one event; raise `InvalidEventError` naming the field, value and fix.

    `arrival_ms` bounds event time: a timestamp from the future would sit on top of its user's
    history, and mask everything that really happens until then.
    """
    event = _decode(Event, raw)
    check_not_future(event, arrival_ms=arrival_ms, max_future_s=max_future_s)
    return event


def decode_item(raw: bytes, *, arrival_ms: int, max_future_s: float) -> Item:
    """The same for an item; metadata without a timestamp is as of its arrival."""
    item = _decode(Item, raw)
    check_not_future(item, arrival_ms=arrival_ms, max_future_s=max_future_s)
    return item if item.timestamp else item.model_copy(update={"timestamp": arrival_ms})


def decode_id(raw: bytes, *, field: str) -> str:
    """An id that doesn't stand in JSON. Any characters will do, line ends and slashes too."""
    try:
        return _ID.validate_python(raw.decode())
    except (ValidationError, UnicodeDecodeError):
        fix = "must be an id: 1 to 256 characters in UTF-8"
        raise InvalidEventError(field=field, value=raw[:256], fix=fix) from None


def decode_user_id(key: bytes) -> str:
    """The user whom a record with this key and no value wishes to be forgotten."""
    return decode_id(key, field="key")


def check_not_future(record: Event | Item, *, arrival_ms: int, max_future_s: float) -> None:
    """Raise `InvalidEventError` for a record that claims to be of after its arrival."""
    if record.timestamp > arrival_ms + max_future_s * 1000:
        raise InvalidEventError(
            field="timestamp",
            value=record.timestamp,
            fix=f"must be at most {max_future_s:g} s after arrival ({arrival_ms}); send UTC "
            "milliseconds and check the producer's clock",
        )


def invalid(error: ValidationError) -> InvalidEventError:
    """Our error for pydantic's first complaint."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    value = first.get("input")
    fix = first["msg"]
    if first["type"] == "missing":
        fix, value = "is required; add it", None
    elif first["type"] == "extra_forbidden":
        fix = "is not a field of the contract; put it into `context`"
    elif first["type"] == "json_invalid":
        fix, value, field = f"is not JSON ({first['ctx']['error']})", None, ""
    return InvalidEventError(field=field, value=value, fix=fix)


def dead_letter(raw: bytes, *, reason: str, topic: str, partition: int, offset: int) -> bytes:
    """The JSON that `<topic>.dead` carries: why, where from, and the original bytes (base64).

    It fits into a record whatever came: of `raw`, `cut_bytes` may be missing at the end.
    """
    letter = {
        "reason": reason[:MAX_REASON_CHARS],
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "raw": base64.b64encode(raw[:MAX_DEAD_BYTES]).decode(),
        "cut_bytes": max(0, len(raw) - MAX_DEAD_BYTES),
    }
    return json.dumps(letter).encode()


Record = TypeVar("Record", Event, Item)


def _decode(contract: type[Record], raw: bytes) -> Record:
    try:
        return contract.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error) from None
