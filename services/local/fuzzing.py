"""`reflux bench fuzz`: a running stack, what nobody would send, and an account of every record."""

import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final
from urllib.parse import urlsplit

import httpx
import orjson

from services.core.errors import RefluxError
from services.core.events import EVENTS, ITEMS
from services.core.kafka import Publisher, end_offsets, lag
from services.core.settings import Settings
from services.core.stackfile import read_stack
from services.local import daemon
from services.local.accounts import account
from services.local.fuzz import ANSWERS, CONSOLE, GATEWAY, Call, calls, records
from services.local.load import Producer
from services.local.load import events as seeded
from services.local.probe import Probe, settled
from services.local.promises import Promise
from services.local.waiting import alongside, wait

READY_S: Final = 600.0  # for a first student
SLOWEST_PER_S: Final = 200  # of what was sent, read and learned
AT_ONCE: Final = 16  # requests
BATCH: Final = 500  # records of one publish
TELL_EVERY: Final = 50_000
TIMEOUT_S: Final = 30.0
TRIES: Final = 3
NO_ANSWER: Final = 0
SHOWN_CHARS: Final = 400
ACKNOWLEDGING: Final = {"/v1/events": EVENTS, "/v1/items": ITEMS}


@dataclass(kw_only=True)
class Answers:
    """How often each server answered with each status, and how many records of each topic the
    gateway acknowledged, wishes to be forgotten included."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Answers") -> None:
        self.statuses += other.statuses
        self.acknowledged += other.acknowledged


class Fuzz:
    """One run, on a stack that it starts and stops."""

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int,
        n_records: int,
        n_requests: int,
        report: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._seed, self._n_records, self._n_requests = seed, n_records, n_requests
        self._report = report

    def run(self) -> list[Promise]:
        """Start, send, account, stop."""
        with daemon.running(self._settings, report=self._report) as settings:
            return self._fuzz(settings)

    def _fuzz(self, settings: Settings) -> list[Promise]:
        self._teach(settings)
        begin = {topic: end_offsets(settings, topic) for topic in (EVENTS, ITEMS)}
        processes = (read_stack(settings) or {})["processes"]
        acknowledged = self._publish(settings)
        give_up_s = READY_S + (self._n_records + self._n_requests) / SLOWEST_PER_S
        self._report("waiting for the feature worker")
        wait("all records read", lambda: _all_read(settings), give_up_s=give_up_s)
        self._report(f"{self._n_requests:,} requests")
        answers = self._ask(settings)
        self._report("waiting for worker and learner")
        wait("everything read and learned", lambda: settled(settings), give_up_s=give_up_s)
        self._report("accounting")
        acknowledged += answers.acknowledged
        return [
            _no_failure(answers.statuses, self._n_requests),
            *(
                account(settings, topic, begin[topic], acknowledged=acknowledged[topic])
                for topic in (EVENTS, ITEMS)
            ),
            Promise(
                name="no process died of it",
                kept=(read_stack(settings) or {}).get("processes") == processes,
                found=f"{len(processes)} processes, and the learner has read all",
            ),
        ]

    def _teach(self, settings: Settings) -> None:
        """Sound events until a student answers: before that, a 503 is the right answer."""
        with (
            httpx.Client(base_url=settings.gateway_url, timeout=30) as events,
            alongside(Producer(events, seeded(self._seed), rate=200.0).run),
        ):
            wait("a first student", Probe(settings, events).answers, give_up_s=READY_S)
        wait("everything read and learned", lambda: settled(settings), give_up_s=READY_S)

    def _publish(self, settings: Settings) -> Counter[str]:
        """All records; how many of each topic."""
        self._report(f"{self._n_records:,} records")
        sent: Counter[str] = Counter()
        publisher = Publisher(settings)
        stream = islice(records(self._seed), self._n_records)
        while batch := list(islice(stream, BATCH)):
            for topic in (EVENTS, ITEMS):
                of_topic = [(r.key, r.value) for r in batch if r.topic == topic]
                publisher.publish(topic, of_topic)
                sent[topic] += len(of_topic)
            if sent.total() % TELL_EVERY == 0:
                self._report(f"{sent.total():,} records sent")
        publisher.close()
        return sent

    def _ask(self, settings: Settings) -> Answers:
        """All requests, from several threads that share one stream of them."""
        urls = {
            GATEWAY: settings.gateway_url,
            ANSWERS: settings.recommend_url,
            CONSOLE: settings.console_url,
        }
        lock, numbered = threading.Lock(), enumerate(islice(calls(self._seed), self._n_requests))

        def shared() -> Iterator[Call]:
            while True:
                with lock:
                    number, call = next(numbered, (-1, None))
                if call is None:
                    return
                if number and number % TELL_EVERY == 0:
                    self._report(f"{number:,} requests sent")
                yield call

        def ask() -> Answers:
            answers, doors = Answers(), {name: Door(url) for name, url in urls.items()}
            for call in shared():
                status, body = doors[call.server].send(call)
                answers.statuses[call.server, status] += 1
                if _failed(status):
                    told = f"{status} from {call.server}: {body[:SHOWN_CHARS]!r} to {call}"
                    self._report(told[: 2 * SHOWN_CHARS])
                elif call.server == GATEWAY and (topic := _acknowledging(call)):
                    answers.acknowledged[topic] += _accepted(body)
            return answers

        total = Answers()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for told in [pool.submit(ask) for _ in range(AT_ONCE)]:
                total.add(told.result())
        return total


class Door:
    """One server, by a connection that is kept: a third of what a pool's client takes of a core.
    Not thread-safe."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)

    def send(self, call: Call) -> tuple[int, bytes]:
        """Status (`NO_ANSWER`: none came in three tries) and body.

        A connection may have been closed since the last request; and of a request that is refused
        before all of it was read, the answer may get lost on the way.
        """
        for _ in range(TRIES):
            try:
                return self._exchange(call)
            except (http.client.HTTPException, OSError):
                self._http.close()
        return NO_ANSWER, b""

    def _exchange(self, call: Call) -> tuple[int, bytes]:
        named = any(name == b"host" for name, _ in call.headers)
        self._http.putrequest(call.method, call.path, skip_host=named, skip_accept_encoding=True)
        for name, value in call.headers:
            self._http.putheader(name.decode(), value)
        if call.body or call.method in ("POST", "PUT", "PATCH"):
            self._http.putheader("content-length", str(len(call.body)))
        self._http.endheaders(call.body or None)
        response = self._http.getresponse()
        return response.status, response.read()


def _all_read(settings: Settings) -> bool:
    try:
        return not any(sum(lag(settings, topic).values()) for topic in (EVENTS, ITEMS))
    except RefluxError:
        return False


def _acknowledging(call: Call) -> str | None:
    """The topic of the records that this request brings; None: it brings none."""
    if call.method == "PUT" and call.path.startswith("/v1/items/"):
        return ITEMS
    if call.method == "DELETE" and call.path.startswith("/v1/users/"):
        return EVENTS
    return ACKNOWLEDGING.get(call.path) if call.method == "POST" else None


def _accepted(body: bytes) -> int:
    try:
        return int(orjson.loads(body)["accepted"])
    except (ValueError, KeyError, TypeError):  # refused whole, with another answer
        return 0


def _failed(status: int) -> bool:
    return status >= 500 or status == NO_ANSWER


def _no_failure(statuses: Counter[tuple[str, int]], sent: int) -> Promise:
    failed = sum(n for (_, status), n in statuses.items() if _failed(status))
    told = ", ".join(f"{n:,} {server} {status}" for (server, status), n in sorted(statuses.items()))
    return Promise(
        name="every request answered, none by a 5xx",
        kept=not failed and statuses.total() == sent,
        found=f"{statuses.total():,} of {sent:,}: {told}",
    )
