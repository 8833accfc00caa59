"""How topics, producers and consumers are made, and where a partition ends.

Right on Apache Kafka and on the embedded broker, which differs where comments say so.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import IllegalStateError, KafkaError, TopicAlreadyExistsError

from services.core.errors import SettingsError, UnavailableError
from services.core.eventlog import EPOCH_SPAN, EventLog
from services.core.events import EVENTS, ITEMS, dead_topic
from services.core.settings import Settings

MAX_RECORD_BYTES: Final = 1_000_000  # Kafka's default limit is 1 MiB, headers included
KeyValue: TypeAlias = tuple[bytes | None, bytes | None]
GROUP: Final = "reflux-features"  # the feature workers
MAX_WAIT_MS: Final = 1_000
WAIT_STEP: Final = 4
LOOK_MS: Final = 50  # between two looks whether a fetch needs longer


def ensure_topics(settings: Settings) -> None:
    """Create the topics that are missing: `events`, `items` and their dead letters."""
    wanted = {EVENTS: settings.partitions, ITEMS: settings.partitions}
    wanted |= {dead_topic(topic): 1 for topic in wanted}
    with _opened(settings, partial(_connect, KafkaAdminClient)) as admin:
        for topic, partitions in wanted.items():
            spec = {
                "num_partitions": partitions,
                "replication_factor": settings.replication,
                # Arrival is the broker's clock; the embedded one keeps the producer's.
                "configs": {"message.timestamp.type": "LogAppendTime"},
            }
            try:
                admin.create_topics({topic: spec})
            except TopicAlreadyExistsError:
                continue


class Topic(NamedTuple):
    """As it is now. The broker gives each an id when it is created: one made anew has a new id."""

    id: str
    partitions: list[int]


def describe(settings: Settings, topic: str) -> Topic:
    """Raises `UnavailableError` where there is no such topic."""
    with _opened(settings, partial(_connect, KafkaAdminClient)) as admin:
        found: dict[str, Any] = admin.describe_topics([topic])[0]
    if found["error_code"] != 0:
        raise _no_topic(topic)
    partitions = [int(partition["partition_index"]) for partition in found["partitions"]]
    return Topic(str(found["topic_id"]), partitions)


def resume_offsets(
    settings: Settings, log: EventLog, partitions: Iterable[int] | None = None
) -> dict[int, int]:
    """Log offsets at which to go on reading the log's topic in Kafka (default: all partitions).

    Seek to `kafka_offset(...)` of them; a record's log offset is its own plus
    `epoch_of(...) * EPOCH_SPAN`. A topic that was created anew since begins the next epoch here.
    """
    topic = describe(settings, log.topic)
    begin = log.epoch(topic.id) * EPOCH_SPAN
    end = log.end()
    if partitions is None:
        partitions = topic.partitions
    return {partition: max(begin, end.get(partition, begin)) for partition in partitions}


def make_producer(settings: Settings, **overrides: Any) -> KafkaProducer:
    """An idempotent producer that waits for all replicas; linger 5 ms makes batches of streams."""
    timeout_ms = max(20, int(settings.kafka_timeout_s * 1000))
    defaults: dict[str, Any] = {
        "linger_ms": 5,
        "batch_size": 256 * 1024,
        "max_block_ms": timeout_ms,
        "delivery_timeout_ms": timeout_ms,
        "request_timeout_ms": timeout_ms - 5,  # linger + request must fit into delivery
    }
    return _connect(KafkaProducer, settings, **{**defaults, **overrides})


def make_consumer(
    settings: Settings, *, group: str | None = None, **overrides: Any
) -> KafkaConsumer:
    """A consumer without automatic commits; the caller subscribes, or assigns and seeks.

    Measured on the embedded broker: a fetch waits 125 ms unless told 25 (see `_PatientConsumer`; at
    10 an event comes 4 ms sooner, but a consumer that finds nothing takes a fifth of a core instead
    of a tenth), a join takes half the session timeout, and polls of 5,000 double the throughput.
    """
    defaults: dict[str, Any] = {
        "group_id": group,
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "fetch_max_wait_ms": 25,
        "session_timeout_ms": int(settings.kafka_session_s * 1000),
        "heartbeat_interval_ms": int(settings.kafka_session_s * 1000 / 3),
        "max_poll_records": 5_000,
        "max_partition_fetch_bytes": 4 * 2**20,
    }
    return _connect(_PatientConsumer, settings, **{**defaults, **overrides})


class _PatientConsumer(KafkaConsumer):
    """Lets a fetch take as long as the broker needs to find what there is.

    The embedded broker ends a fetch after `fetch_max_wait_ms` with what it has found by then, and
    to find anything it lists all batches of the partition: among 25,000, 10 ms pass with nothing
    found, for ever. Within 1,000 ms it finds what there is among 250,000, but where there is
    nothing, it sleeps for up to half of that and sees nothing arrive. So a fetch may take longer
    only while records are known to be there. Apache Kafka has an index, and answers as soon as
    there are records, however long it may wait.
    """

    def __init__(self, *topics: str, **config: Any) -> None:
        super().__init__(*topics, **config)
        # The client has no public way to change this; it reads it before each fetch.
        self._fetch_config: dict[str, Any] = self._fetcher.config
        self._least_wait_ms = int(self._fetch_config["fetch_max_wait_ms"])
        self._without_ms = 0.0  # polled since the last records, or the last change

    def poll(self, timeout_ms: float = 0, *args: Any, **options: Any) -> Any:
        """As `KafkaConsumer.poll`."""
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            began = time.monotonic()
            look_ms = min(LOOK_MS, max(0.0, deadline - began) * 1000)
            polled = super().poll(look_ms, *args, **options)
            ended = time.monotonic()
            self._adapt((ended - began) * 1000)
            if polled:
                self._without_ms = 0.0
            if polled or ended >= deadline:
                return polled

    def _adapt(self, polled_ms: float) -> None:
        self._without_ms += polled_ms
        wait_ms = self._fetch_config["fetch_max_wait_ms"]
        if not self._is_behind():
            wait_ms, self._without_ms = self._least_wait_ms, 0.0
        elif self._without_ms >= wait_ms:
            wait_ms, self._without_ms = min(wait_ms * WAIT_STEP, MAX_WAIT_MS), 0.0
        self._fetch_config["fetch_max_wait_ms"] = wait_ms

    def _is_behind(self) -> bool:
        """Whether the last fetches told of records that have not come yet."""
        for partition in self.assignment():
            with suppress(IllegalStateError):  # just revoked
                end, at = self.highwater(partition), self.position(partition, timeout_ms=0)
                if end is not None and at is not None and at < end:
                    return True
        return False


def end_offsets(settings: Settings, topic: str) -> dict[int, int]:
    """Per partition the Kafka offset that the next record will get."""
    with _opened(settings, make_consumer) as consumer:
        return _end_offsets(settings, consumer, topic)


def read_up_to(
    consumer: KafkaConsumer, ends: Mapping[TopicPartition, int], *, give_up_s: float
) -> Iterator[Any]:
    """The records from where the assigned partitions stand to these ends, or a little further;
    `UnavailableError` where none has come for `give_up_s`."""
    while short := [where for where, end in ends.items() if consumer.position(where) < end]:
        polled = consumer.poll(timeout_ms=1000 * give_up_s)
        if not polled:
            at = {f"{where.topic} {where.partition}": consumer.position(where) for where in short}
            raise UnavailableError(f"nothing comes any more, and the ends are not reached: {at}")
        for records in polled.values():
            yield from records


def lag(settings: Settings, topic: str = EVENTS) -> dict[int, int]:
    """Per partition how many records the feature workers have not committed yet."""
    with _opened(settings, partial(make_consumer, group=GROUP)) as consumer:
        return {
            partition: end - (consumer.committed(TopicPartition(topic, partition)) or 0)
            for partition, end in _end_offsets(settings, consumer, topic).items()
        }


class Publisher:
    """Writes records and returns when Kafka has them; thread-safe; survives its broker.

    An idempotent producer never recovers from a broker that lost its log, so one that failed is
    replaced, and what it didn't deliver is sent again: a record may then be twice in Kafka, and
    the event's id makes it count once.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Half of the time, so that a second producer gets its turn before the deadline.
        self._half = _within(settings, settings.kafka_timeout_s / 2)
        self._producer: KafkaProducer | None = None
        self._lock = threading.Lock()

    def publish(
        self,
        topic: str,
        records: Iterable[KeyValue],
        *,
        deadline: float | None = None,
    ) -> None:
        """Send (key, value) pairs; raise `UnavailableError` after `deadline` (monotonic seconds;
        default: in `kafka_timeout_s`). A key without a value wishes to be forgotten.

        After the error some of the records may be in Kafka nevertheless.
        """
        deadline = deadline or time.monotonic() + self._settings.kafka_timeout_s
        pending = list(records)
        while pending:
            producer = self._connected(deadline)
            error, pending = _send(producer, topic, pending, deadline=deadline)
            if error is None:
                continue
            self._discard(producer)
            if time.monotonic() > deadline:
                raise _unavailable(self._settings, error)

    def close(self) -> None:
        """Deliver what is on its way, at most for `kafka_timeout_s`."""
        if self._producer is not None:
            with suppress(KafkaError):
                self._producer.close(timeout=self._settings.kafka_timeout_s)
            self._producer = None

    def _connected(self, deadline: float) -> KafkaProducer:
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise _unavailable(self._settings, "still connecting")
        try:
            if self._producer is None:
                ensure_topics(_within(self._settings, deadline - time.monotonic()))
                self._producer = make_producer(self._half)
            return self._producer
        finally:
            self._lock.release()

    def _discard(self, producer: KafkaProducer) -> None:
        with self._lock:
            if self._producer is producer:
                self._producer = None
        with suppress(KafkaError):  # of a broker that hangs: "timeout waiting", which was the idea
            producer.close(timeout=0)


def _send(
    producer: KafkaProducer,
    topic: str,
    records: list[KeyValue],
    *,
    deadline: float,
) -> tuple[KafkaError | None, list[KeyValue]]:
    """Send all; return the last error, if any, and the records that were not acknowledged."""
    sent = []
    failed: list[KeyValue] = []
    error: KafkaError | None = None
    for key, value in records:
        try:
            sent.append(producer.send(topic, key=key, value=value))
        except KafkaError as problem:
            error = problem
            break
    for future, record in zip(sent, records, strict=False):
        try:
            future.get(timeout=max(0.0, deadline - time.monotonic()))
        except KafkaError as problem:
            error = problem
            failed.append(record)
    return error, failed + records[len(sent) :]


def _end_offsets(settings: Settings, consumer: KafkaConsumer, topic: str) -> dict[int, int]:
    """The embedded broker's own answer is the first offset of its last batch; the high watermark
    that comes with a fetch from there is right on every broker."""
    partitions = [
        TopicPartition(topic, number)
        for number in sorted(consumer.partitions_for_topic(topic) or ())
    ]
    if not partitions:
        raise _no_topic(topic)
    consumer.assign(partitions)
    for partition, offset in consumer.end_offsets(partitions).items():
        consumer.seek(partition, offset)
    deadline = time.monotonic() + settings.kafka_timeout_s
    while any(consumer.highwater(partition) is None for partition in partitions):
        consumer.poll(timeout_ms=20)
        if time.monotonic() > deadline:
            raise _unavailable(settings, f"no answer about the end of {topic!r}")
    return {partition.partition: consumer.highwater(partition) for partition in partitions}


@contextmanager
def _opened(settings: Settings, make: Callable[[Settings], Any]) -> Iterator[Any]:
    """A client for a few questions; what it can't answer is an `UnavailableError`."""
    client = make(settings)
    try:
        yield client
    except KafkaError as error:
        raise _unavailable(settings, error) from None
    finally:
        client.close()


def _connect(client: Callable[..., Any], settings: Settings, **config: Any) -> Any:
    if not settings.kafka_bootstrap:
        raise SettingsError(
            "REFLUX_KAFKA_BOOTSTRAP is empty and no stack runs here; set it to host:port, "
            "or start the embedded broker with `reflux up`"
        )
    try:
        return client(
            bootstrap_servers=settings.kafka_bootstrap.split(","),
            bootstrap_timeout_ms=max(1, int(settings.kafka_timeout_s * 1000)),
            **_security(settings),
            **config,
        )
    except KafkaError as error:
        raise _unavailable(settings, error) from None


def _security(settings: Settings) -> dict[str, Any]:
    """TLS and SASL as every client of kafka-python takes them."""
    given: dict[str, Any] = {"security_protocol": settings.kafka_security}
    if "SSL" in settings.kafka_security:
        given |= {
            "ssl_cafile": settings.kafka_ca_file or None,
            "ssl_certfile": settings.kafka_cert_file or None,
            "ssl_keyfile": settings.kafka_key_file or None,
        }
    if "SASL" in settings.kafka_security:
        given |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_username,
            "sasl_plain_password": settings.kafka_password.get_secret_value(),
        }
    return given


def _within(settings: Settings, timeout_s: float) -> Settings:
    return settings.model_copy(update={"kafka_timeout_s": max(0.1, timeout_s)})


def _no_topic(topic: str) -> UnavailableError:
    return UnavailableError(f"Kafka has no topic {topic!r}; the gateway and the worker create it")


def _unavailable(settings: Settings, why: object) -> UnavailableError:
    return UnavailableError(
        f"Kafka at {settings.kafka_bootstrap} doesn't answer in time ({why}); "
        "check that it runs and is reachable, or raise REFLUX_KAFKA_TIMEOUT_S"
    )
