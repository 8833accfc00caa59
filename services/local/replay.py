"""Play an interaction log as its users would have: items first, then events in time order."""

import time
from collections.abc import Callable, Iterator
from itertools import islice

import orjson

from ray_jobs.datasets import InteractionLog, load
from services.core.errors import RefluxError
from services.core.events import EVENTS
from services.core.kafka import make_producer
from services.core.settings import Settings
from services.local.client import Client

BATCH_EVENTS = 1_000
TICK_S = 0.1  # a live producer's batch: small enough that freshness isn't waiting for it

Progress = Callable[[int], None]


def replay(
    settings: Settings,
    *,
    dataset: str,
    rate: float,
    skip: int,
    limit: int | None,
) -> int:
    """Send a log through the gateway at `rate` events/s (0: as fast as it takes them)."""
    log = load(dataset, home=settings.home, data=settings.data)
    with Client(settings) as client:
        send_items(client, log)
        stream = event_lines(log, first=skip, last=skip + limit if limit else None)
        sent = 0
        for batch in paced(stream, rate=rate):
            sent += send_batch(client, batch)
    return sent


def send_items(client: Client, log: InteractionLog) -> None:
    """Post every item's metadata through the gateway."""
    for batch in log.items.to_batches(max_chunksize=BATCH_EVENTS):
        items = [{k: v for k, v in row.items() if v is not None} for row in batch.to_pylist()]
        _check(client.put_items(orjson.dumps(items)))


def send_batch(client: Client, lines: list[bytes]) -> int:
    """Post events as one array; every one must be accepted."""
    answer = client.send(b"[" + b",".join(lines) + b"]")
    _check(answer)
    return int(answer["accepted"])


def produce_history(
    settings: Settings, log: InteractionLog, *, last: int, progress: Progress
) -> None:
    """Write the first `last` events straight to Kafka, as a bulk import would; wait for acks."""
    producer = make_producer(settings)
    try:
        for sent, (user, line) in enumerate(keyed_lines(log, first=0, last=last), start=1):
            producer.send(EVENTS, key=user.encode(), value=line)
            if sent % BATCH_EVENTS == 0:
                progress(sent)
        producer.flush(timeout=120)
        progress(last)
    finally:
        producer.close()


def event_lines(log: InteractionLog, *, first: int, last: int | None) -> Iterator[bytes]:
    """The log's events `[first, last)` as contract JSON, with ids that a second replay repeats."""
    return (line for _, line in keyed_lines(log, first=first, last=last))


def paced(
    lines: Iterator[bytes],
    *,
    rate: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[list[bytes]]:
    """Batches of lines, held back so that `rate` events/s leave (0: no holding back).

    What a slow consumer of this iterator missed is caught up in batches of at most
    `BATCH_EVENTS`. `clock` and `sleep` are for tests.
    """
    start, given = clock(), 0
    while True:
        due = BATCH_EVENTS
        if rate:
            while (due := int((clock() - start) * rate) - given) < 1:
                sleep(TICK_S)
        batch = list(islice(lines, min(due, BATCH_EVENTS)))
        if not batch:
            return
        given += len(batch)
        yield batch


def keyed_lines(
    log: InteractionLog, *, first: int, last: int | None
) -> Iterator[tuple[str, bytes]]:
    """(user, event as contract JSON), as they go to Kafka."""
    columns = log.events.column_names
    end = log.events.num_rows if last is None else min(last, log.events.num_rows)
    for start in range(first, end, BATCH_EVENTS):
        part = log.events.slice(start, min(BATCH_EVENTS, end - start))
        types = part["type"].to_pylist() if "type" in columns else [None] * part.num_rows
        values = part["value"].to_pylist() if "value" in columns else [None] * part.num_rows
        rows = zip(
            part["user_id"].to_pylist(),
            part["item_id"].to_pylist(),
            part["timestamp_ms"].to_pylist(),
            types,
            values,
            strict=True,
        )
        for index, (user, item, timestamp, type_, value) in enumerate(rows, start=start):
            event = {
                "event_id": f"{log.name}-{index}",
                "user_id": user,
                "item_id": item,
                "type": type_ or ("click" if value is None else "rating"),
                "timestamp": timestamp,
            }
            if value is not None:
                event["value"] = value
            yield user, orjson.dumps(event)


def _check(answer: dict[str, object]) -> None:
    rejected = answer["rejected"]
    if isinstance(rejected, list) and rejected:
        raise RefluxError(f"the gateway rejected {len(rejected)}, the first: {rejected[0]}")
