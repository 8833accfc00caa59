"""`reflux bench fuzz`: a running stack, what nobody would send, and an account of every record."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final

import httpx

from services.core.eventlog import EventLog
from services.core.events import EVENTS, ITEMS
from services.core.kafka import Publisher, end_offsets
from services.core.settings import Settings
from services.core.stackfile import read_stack
from services.ingest.dead import dead_letters
from services.local import daemon
from services.local.fuzz import ANSWERS, GATEWAY, Call, calls, records
from services.local.load import Producer
from services.local.load import events as seeded
from services.local.probe import Probe, settled
from services.local.promises import Promise
from services.local.stack import tear_down
from services.local.waiting import wait

READY_S: Final = 240.0  # for a first student, and for everything to be read and learned
AT_ONCE: Final = 8  # requests
BATCH: Final = 500  # records of one publish
NO_ANSWER: Final = 0
SHOWN_CHARS: Final = 400


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
        daemon.start(self._settings, report=self._report)
        try:
            return self._fuzz(Settings.load())  # with the addresses of what runs now
        finally:
            tear_down(self._settings, report=self._report)

    def _fuzz(self, settings: Settings) -> list[Promise]:
        self._teach(settings)
        before = _books(settings)
        processes = (read_stack(settings) or {})["processes"]
        self._report(f"{self._n_records:,} records")
        publisher = Publisher(settings)
        stream = islice(records(self._seed), self._n_records)
        while batch := list(islice(stream, BATCH)):
            for topic in (EVENTS, ITEMS):
                publisher.publish(topic, [(r.key, r.value) for r in batch if r.topic == topic])
        publisher.close()
        self._report(f"{self._n_requests:,} requests")
        statuses, forgotten = self._ask(settings)
        self._report("accounting")
        wait("everything read and learned", lambda: settled(settings), give_up_s=READY_S)
        after = _books(settings)
        return [
            _no_failure(statuses),
            _all_accounted_for(EVENTS, before, after, forgotten=forgotten),
            _all_accounted_for(ITEMS, before, after),
            Promise(
                name="no process died of it",
                kept=(read_stack(settings) or {}).get("processes") == processes,
                found=f"{len(processes)} processes, and the learner has read all",
            ),
        ]

    def _teach(self, settings: Settings) -> None:
        """Sound events until a student answers: before that, a 503 is the right answer."""
        stop = threading.Event()
        with httpx.Client(base_url=settings.gateway_url, timeout=30) as events:
            producing = threading.Thread(
                target=Producer(events, seeded(self._seed), rate=200.0).run, args=(stop,)
            )
            producing.start()
            try:
                wait("a first student", Probe(settings, events).answers, give_up_s=READY_S)
            finally:
                stop.set()
                producing.join()
        wait("everything read and learned", lambda: settled(settings), give_up_s=READY_S)

    def _ask(self, settings: Settings) -> tuple[Counter[tuple[str, int]], int]:
        """How often each server answered with each status, and how many users it took to forget."""
        urls = {GATEWAY: settings.gateway_url, ANSWERS: settings.recommend_url}
        statuses: Counter[tuple[str, int]] = Counter()
        forgotten = 0
        with httpx.Client(timeout=30) as http, ThreadPoolExecutor(AT_ONCE) as pool:

            def send(call: Call) -> tuple[Call, int]:
                try:
                    answer = http.request(
                        call.method,
                        urls[call.server] + call.path,
                        headers=call.headers,
                        content=call.body,
                    )
                except httpx.TransportError:
                    return call, NO_ANSWER
                return call, answer.status_code

            # Windows, so that millions don't wait in memory.
            stream = islice(calls(self._seed), self._n_requests)
            while window := list(islice(stream, 64 * AT_ONCE)):
                for call, status in pool.map(send, window):
                    statuses[call.server, status] += 1
                    if _failed(status):
                        self._report(f"{status} from {call.server}: {call}"[:SHOWN_CHARS])
                    forgotten += call.method == "DELETE" and status == 202
        return statuses, forgotten


def _books(settings: Settings) -> dict[str, tuple[int, int, int]]:
    """Per topic: records in Kafka, rows in the log, dead letters."""
    dead = Counter(letter.topic for letter in dead_letters(settings))
    return {
        topic: (
            sum(end_offsets(settings, topic).values()),
            len(EventLog(settings.offline, topic).read(columns=["offset"])),
            dead[topic],
        )
        for topic in (EVENTS, ITEMS)
    }


def _failed(status: int) -> bool:
    return status >= 500 or status == NO_ANSWER


def _no_failure(statuses: Counter[tuple[str, int]]) -> Promise:
    failed = sum(n for (_, status), n in statuses.items() if _failed(status))
    told = ", ".join(f"{n:,} {server} {status}" for (server, status), n in sorted(statuses.items()))
    return Promise(name="every request answered, none by a 5xx", kept=not failed, found=told)


def _all_accounted_for(
    topic: str,
    before: dict[str, tuple[int, int, int]],
    after: dict[str, tuple[int, int, int]],
    *,
    forgotten: int = 0,
) -> Promise:
    sent, logged, dead = (b - a for a, b in zip(before[topic], after[topic], strict=True))
    return Promise(
        name=f"every record of {topic} accounted for",
        kept=sent == logged + dead + forgotten,
        found=f"{sent:,} in Kafka: {logged:,} in the log, {dead:,} dead letters with a reason, "
        f"{forgotten:,} wishes to be forgotten",
    )
