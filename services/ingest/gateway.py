"""HTTP -> Kafka: the front door for events and item metadata.

    python -m services.ingest.gateway

A record is acknowledged (202) once Kafka has it. Invalid records are answered one by one with the
field, the value and the fix (422), and don't keep the valid ones beside them from being accepted.
"""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool

from services.core import logs
from services.core.access import Role
from services.core.errors import (
    AccessError,
    BusyError,
    ForbiddenError,
    InvalidEventError,
    UnavailableError,
)
from services.core.events import EVENTS, ITEMS, Event, Item
from services.core.history import event_key
from services.core.kafka import Publisher, describe
from services.core.paths import allow_anything, id_after
from services.core.pauses import settle
from services.core.settings import Settings
from services.ingest.batch import (
    NDJSON,
    Answer,
    Batch,
    load_json,
    parse,
    rejection,
    split,
)
from services.ingest.held import Held, TooLargeError

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 2
READY_TIMEOUT_S: Final = 2.0
EVENT_EXAMPLE: Final = {
    "event_id": "6f1c9e5e-0001",
    "user_id": "42",
    "item_id": "Toy Story (1995)",
    "type": "rating",
    "timestamp": 1_767_225_600_000,
    "value": 5.0,
}
ITEM_EXAMPLE: Final = {
    "item_id": "Toy Story (1995)",
    "title": "Toy Story (1995)",
    "categories": ["Animation", "Comedy"],
}


class Metrics:
    """What the gateway counts; one registry per app, so that tests can make several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.accepted = Counter(
            "reflux_gateway_accepted", "Events that Kafka has", registry=self.registry
        )
        self.items = Counter(
            "reflux_gateway_items_accepted", "Items that Kafka has", registry=self.registry
        )
        self.rejected = Counter(
            "reflux_gateway_rejected",
            "Records and requests not accepted",
            ["reason"],
            registry=self.registry,
        )
        self.held = Gauge(
            "reflux_gateway_held_bytes",
            "Of requests that Kafka has not acknowledged yet",
            registry=self.registry,
        )
        self.ack = Histogram(
            "reflux_gateway_ack_seconds",
            "From the whole body read to acknowledged by Kafka",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )


def create_app(settings: Settings) -> FastAPI:
    """The application; it connects to Kafka with the first request that needs it."""
    publisher = Publisher(settings)
    metrics = Metrics()
    keys = settings.keys
    held = Held(settings.max_held_bytes, metrics.held)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(publisher.close)

    allow_anything()
    app = FastAPI(title="Reflux: events", version="1", lifespan=lifespan)

    def let_in(request: Request, role: Role) -> None:
        keys.check(request.headers.get("authorization"), role)

    async def accept(
        request: Request,
        topic: str,
        counter: Counter,
        amend: Callable[[bytes], bytes] = lambda body: body,
    ) -> JSONResponse:
        let_in(request, "produce")
        async with held.body(request, max_bytes=settings.max_body_bytes) as body:
            content_type = request.headers.get("content-type", "")
            started = time.perf_counter()
            deadline = time.monotonic() + settings.kafka_timeout_s

            def work() -> Batch:
                batch = parse(
                    topic,
                    records(amend(body), content_type),
                    arrival_ms=_now_ms(),
                    max_future_s=settings.max_future_s,
                )
                publisher.publish(topic, batch.valid, deadline=deadline)
                return batch

            try:  # the threads' own deadline, and waiting for one of them
                batch = await asyncio.wait_for(
                    run_in_threadpool(work), settings.kafka_timeout_s + 1
                )
            except TimeoutError:
                raise UnavailableError("too many requests wait for Kafka; retry later") from None
        metrics.ack.observe(time.perf_counter() - started)
        counter.inc(len(batch.valid))
        metrics.rejected.labels("invalid").inc(len(batch.rejected))
        if logger.isEnabledFor(logging.DEBUG) and topic == EVENTS:
            for _, value in batch.valid:
                key = event_key(orjson.loads(value)["event_id"])
                logger.debug("acknowledged", extra={"event_key": key})
        answer = Answer(accepted=len(batch.valid), rejected=batch.rejected)
        return JSONResponse(answer.model_dump(), status_code=422 if batch.rejected else 202)

    def records(body: bytes, content_type: str) -> list[bytes]:
        found = split(body, content_type=content_type)
        if len(found) > settings.max_batch_events:
            raise TooLargeError(
                f"{len(found)} records in one request; at most {settings.max_batch_events} "
                "(REFLUX_MAX_BATCH_EVENTS): send several"
            )
        return found

    @app.post("/v1/events", status_code=202, **_documented("Event", EVENT_EXAMPLE))
    async def post_events(request: Request) -> Response:
        """Take one event (a JSON object), or many (a JSON array, or NDJSON).

        202: Kafka has all of them. 422: Kafka has the valid ones, and `rejected` says what is
        wrong with each of the others; sending the whole batch again is harmless, since an
        `event_id` counts once. 503: retry the whole request.
        """
        return await accept(request, EVENTS, metrics.accepted)

    @app.post("/v1/items", status_code=202, **_documented("Item", ITEM_EXAMPLE))
    async def post_items(request: Request) -> Response:
        """Take metadata of items, in the same forms as events; the latest one of an item holds."""
        return await accept(request, ITEMS, metrics.items)

    @app.put("/v1/items/{item_id:anything}", status_code=202, **_documented("Item", ITEM_EXAMPLE))
    async def put_item(item_id: str, request: Request) -> Response:
        """Take one item's metadata; `item_id` may be left out of the body."""

        def named(body: bytes) -> bytes:
            return _with_item_id(body, id_after("/v1/items/", request, field="item_id"))

        return await accept(request, ITEMS, metrics.items, named)

    @app.delete("/v1/users/{user_id:anything}", status_code=202, response_model=Answer)
    async def delete_user(user_id: str, request: Request) -> Response:
        """Forget a user: features, logged events, replay buffer and checkpoints, within a minute
        or two (role: operate). What comes after this request is a new user's.

        Kafka itself keeps the user's records until its retention ends.
        """
        let_in(request, "operate")
        key = id_after("/v1/users/", request, field="user_id")

        def work() -> None:
            publisher.publish(EVENTS, [(key.encode(), None)])

        await run_in_threadpool(work)
        return JSONResponse(Answer(accepted=1).model_dump(), status_code=202)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        """Whether Kafka answers (else 503)."""
        describe(settings.model_copy(update={"kafka_timeout_s": READY_TIMEOUT_S}), EVENTS)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> JSONResponse:
        metrics.rejected.labels("unavailable").inc()
        return _failed(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        metrics.rejected.labels("busy").inc()
        return _failed(429, str(error), {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(AccessError)
    async def refused(_: Request, error: AccessError) -> JSONResponse:
        metrics.rejected.labels("access").inc()
        if isinstance(error, ForbiddenError):
            return _failed(403, str(error))
        return _failed(401, str(error), {"WWW-Authenticate": "Bearer"})

    @app.exception_handler(TooLargeError)
    async def too_large(_: Request, error: TooLargeError) -> JSONResponse:
        metrics.rejected.labels("too_large").inc()
        return _failed(413, str(error))

    @app.exception_handler(InvalidEventError)
    async def invalid(_: Request, error: InvalidEventError) -> JSONResponse:
        metrics.rejected.labels("invalid").inc()
        answer = Answer(accepted=0, rejected=[rejection(0, error)])
        return JSONResponse(answer.model_dump(), status_code=422)

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _with_item_id(body: bytes, item_id: str) -> bytes:
    given = load_json(body)
    if not isinstance(given, dict):
        raise InvalidEventError(field="", value=given, fix="must be one JSON object")
    if given.setdefault("item_id", item_id) != item_id:
        raise InvalidEventError(
            field="item_id", value=given["item_id"], fix=f"must be left out or {item_id!r}"
        )
    return to_json(given)


def _failed(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code=status, headers=headers)


def _documented(model: str, example: dict[str, Any]) -> dict[str, Any]:
    """What a route tells OpenAPI, since it reads its body itself."""
    one = {"$ref": f"#/components/schemas/{model}"}
    content = {
        "application/json": {
            "schema": {"oneOf": [one, {"type": "array", "items": one}]},
            "examples": {"one": {"value": example}, "batch": {"value": [example]}},
        },
        NDJSON: {"schema": {"type": "string"}, "example": orjson.dumps(example).decode() + "\n"},
    }
    failures = {
        401: "No API key, or an unknown one",
        403: "The API key lacks the role",
        413: "The body or the batch is too large",
        429: "Too much waits for Kafka already; retry",
        503: "Kafka doesn't answer; retry",
    }
    return {
        "response_model": Answer,
        "responses": {
            422: {"model": Answer, "description": "Some are invalid; Kafka has the valid ones"},
            **{status: {"description": text} for status, text in failures.items()},
        },
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, contracts = models_json_schema(
        [(Event, "validation"), (Item, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    document["components"]["schemas"].update(contracts["$defs"])
    return document


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main() -> None:
    settings = Settings.load()
    logs.configure(settings)
    # Uvicorn stops in order and then raises the signal again: that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = create_app(settings)
    settle()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.gateway_port,
        log_config=None,  # ours
        access_log=False,
    )


if __name__ == "__main__":
    main()
