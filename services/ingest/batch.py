"""From the body of a request to records for Kafka, and a reason for each that is none. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, Field
from pydantic_core import from_json, to_json

from services.core.errors import InvalidEventError, shown
from services.core.events import EVENTS, Event, decode_event, decode_item, encode
from services.core.kafka import MAX_RECORD_BYTES

NDJSON: Final = "application/x-ndjson"


class Rejected(BaseModel):
    """Why one record of a request was not accepted, and what would be."""

    index: int = Field(description="its place in the request, from 0 (blank lines don't count)")
    field: str = Field(description="dotted path of the offending field; empty: the whole record")
    value: Any = Field(description="what stood there, shortened")
    fix: str


class Answer(BaseModel):
    """How many records Kafka has, and which ones were rejected."""

    accepted: int
    rejected: list[Rejected] = []


@dataclass(frozen=True)
class Batch:
    """Key and value of each valid record, in order, and the rejected ones."""

    valid: list[tuple[bytes, bytes]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def split(body: bytes, *, content_type: str) -> list[bytes]:
    """The records of a body: NDJSON by its content type, else a JSON array or one JSON value."""
    if content_type.partition(";")[0].strip().lower() == NDJSON:
        return [line for line in body.split(b"\n") if line.strip()]
    if not body.lstrip().startswith(b"["):
        return [body]
    return [to_json(record) for record in load_json(body)]


def load_json(raw: bytes) -> Any:
    """By the parser that reads a record alone: others make 10**30 a float."""
    try:
        return from_json(raw)
    except ValueError as error:
        raise InvalidEventError(field="", value=None, fix=f"is not JSON ({error})") from None


def parse(topic: str, raw: Iterable[bytes], *, arrival_ms: int, max_future_s: float) -> Batch:
    """Records for a topic, events by their user and items by their own id."""
    decode = decode_event if topic == EVENTS else decode_item
    batch = Batch()
    for index, given in enumerate(raw):
        try:
            record = decode(given, arrival_ms=arrival_ms, max_future_s=max_future_s)
            value = encode(record)
            if len(value) > MAX_RECORD_BYTES:
                raise InvalidEventError(
                    field="", value=None, fix=f"must be at most {MAX_RECORD_BYTES} bytes of JSON"
                )
        except InvalidEventError as error:
            batch.rejected.append(rejection(index, error))
        else:
            key = record.user_id if isinstance(record, Event) else record.item_id
            batch.valid.append((key.encode(), value))
    return batch


def rejection(index: int, error: InvalidEventError) -> Rejected:
    return Rejected(index=index, field=error.field, value=shown(error.value), fix=error.fix)
