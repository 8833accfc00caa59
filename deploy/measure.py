"""The constants of deploy/capacity.py, measured: CPU time and bytes, by the services' own code.

    python -m deploy.measure [gateway|worker|answers|sizes|memory|distil ...]

Runs an embedded broker and Redis, the real gateway and feature worker as processes, and answers and
the distillation loop in this one. CPU time, not wall-clock, so that a busy machine matters less.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import redis
import torch
from prometheus_client.parser import text_string_to_metric_families

from ray_jobs import recipes, teacher_log
from ray_jobs.distiller import Distiller
from ray_jobs.evaluate.events import Events
from ray_jobs.evaluate.students import ArraySource, ArrayTeachers, save_teacher
from ray_jobs.peers import ALONE
from ray_jobs.stream import COLUMNS, Received
from ray_jobs.warm_up import state_of
from services.core.catalog import Catalog
from services.core.eventlog import Arrived, EventLog, events_table
from services.core.events import EVENTS, Event, EventType, encode
from services.core.features import FeatureStore
from services.core.history import UserHistory, merge
from services.core.kafka import Publisher, ensure_topics
from services.core.models.student import Student
from services.core.models.teacher import Teacher
from services.core.registry import Registry
from services.core.settings import Settings
from services.local import processes
from services.recommend.schema import RecommendRequest
from services.recommend.service import Recommender

USERS, ITEMS = 500, 4_000
NOW_MS = int(time.time() * 1000)
LOG_ITEMS = pa.table(
    {
        "item_id": pa.array([], pa.string()),
        "title": pa.array([], pa.string()),
        "categories": pa.array([], pa.list_(pa.string())),
        "text": pa.array([], pa.string()),
    }
)


def events(n: int, *, users: int = USERS, items: int = ITEMS) -> list[Event]:
    """As MovieLens-1M has them: ids of its length, items by a long tail, users at random."""
    rng = np.random.default_rng(0)
    user_n = rng.integers(users, size=n)
    item_n = np.minimum(rng.zipf(1.2, size=n), items)
    return [
        Event(
            event_id=f"{i:032x}",
            user_id=f"user-{user}",
            item_id=f"A Film of the Usual Length ({item})",
            type=EventType.RATING,
            timestamp=NOW_MS - 1_000_000 + i,
            value=4.0,
        )
        for i, (user, item) in enumerate(zip(user_n.tolist(), item_n.tolist(), strict=True))
    ]


@contextmanager
def stack(home: Path) -> Iterator[Settings]:
    """Broker and Redis, and settings that lead to them."""
    kafka, store, gateway, worker, answers = (processes.free_port() for _ in range(5))
    commands = [processes.broker(kafka), processes.redis(store, data=home / "redis")]
    running = [processes.Process(command, logs=home) for command in commands]
    try:
        for process in running:
            process.wait_ready()
        settings = Settings(
            home=home,
            kafka_timeout_s=120,  # a busy machine
            kafka_bootstrap=f"127.0.0.1:{kafka}",
            redis=f"127.0.0.1:{store}",
            gateway_port=gateway,
            worker_metrics_port=worker,
            recommend_port=answers,
        )
        ensure_topics(settings)
        yield settings
    finally:
        for process in running:
            process.stop()


@contextmanager
def service(settings: Settings, argv: list[str], port: int) -> Iterator[psutil.Process]:
    command = processes.Command(
        name=argv[-1].rpartition(".")[2].partition(":")[0],
        argv=[sys.executable, "-m", *argv],
        ready=lambda: processes.listens(port),
        env=settings.environment() | {"OMP_NUM_THREADS": "1"},
        ready_timeout_s=300,
    )
    process = processes.Process(command, logs=settings.home)
    try:
        process.wait_ready()
        yield psutil.Process(process.pid)
    finally:
        process.stop()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_gateway(settings: Settings) -> dict[str, float]:
    """CPU of an event that comes alone, and of one that comes in a batch of 100."""
    found = {}
    sent = [encode(event) for event in events(10_000)]
    url = f"http://127.0.0.1:{settings.gateway_port}/v1/events"
    argv = ["services.ingest.gateway"]
    with (
        service(settings, argv, settings.gateway_port) as process,
        httpx.Client(timeout=120) as client,
        ThreadPoolExecutor(16) as callers,
    ):

        def post(part: list[bytes]) -> None:
            headers = {"content-type": "application/x-ndjson"}
            client.post(url, content=b"\n".join(part), headers=headers).raise_for_status()

        post(sent[:1])  # connects to Kafka
        for name, size, n in (("one", 1, 2_000), ("batched", 100, 10_000)):
            began_s = cpu_s(process)
            list(callers.map(post, [sent[at : at + size] for at in range(0, n, size)]))
            found[f"gateway_{name}_cpu_us"] = (cpu_s(process) - began_s) / n * 1e6
    return found


def measure_worker(settings: Settings) -> dict[str, float]:
    """CPU of an event from Kafka to features and log, of users with long rows; its bytes."""
    client = redis.Redis(port=int(settings.redis.split(":")[1]))
    before = int(client.info("memory")["used_memory"])
    users = write_rows(settings, users=2_000, each=200)
    stored = int(client.info("memory")["used_memory"]) - before
    made = events(8_000, users=users)
    publisher = Publisher(settings)
    publisher.publish(EVENTS, [(e.user_id.encode(), encode(e)) for e in made])
    publisher.close()
    own = settings.model_copy(update={"popularity_every_s": 1e6})
    with service(own, ["services.ingest.worker"], settings.worker_metrics_port) as process:
        began_s = cpu_s(process)
        while applied(settings) < len(made):
            time.sleep(0.5)
        time.sleep(settings.log_flush_s + 1)
        spent_s = cpu_s(process) - began_s
    log = sum(f.stat().st_size for f in Path(settings.offline, "events").glob("*.parquet"))
    rows = sum(f.stat().st_size for f in Path(settings.offline, "user_history").glob("*.parquet"))
    return {
        "worker_cpu_us": spent_s / len(made) * 1e6,
        "event_bytes": float(np.mean([len(encode(e)) + len(e.user_id) for e in made[:1_000]])),
        "log_bytes_per_event": log / len(made),
        "history_log_bytes_per_event": rows / len(made),
        "redis_bytes_per_user_event": stored / (users * 200),
    }


def write_rows(settings: Settings, *, users: int, each: int) -> int:
    """Give every user a row of this many events online."""
    by_user: dict[str, list[Arrived[Event]]] = {}
    for i, event in enumerate(events(users * each, users=users)):
        key = f"user-{i % users}"
        own = event.model_copy(update={"user_id": key})
        record = Arrived(record=own, arrival_ms=NOW_MS, partition=0, offset=i)
        by_user.setdefault(key, []).append(record)
    FeatureStore(settings).write_users(
        [
            merge(UserHistory(user_id=user), rows, limit=512, now_ms=NOW_MS)[0]
            for user, rows in by_user.items()
        ]
    )
    return users


def applied(settings: Settings) -> float:
    text = httpx.get(f"http://127.0.0.1:{settings.worker_metrics_port}/metrics", timeout=30).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == "reflux_worker_events_total")


def measure_answers(settings: Settings) -> dict[str, float]:
    """CPU of an answer, online store included and HTTP not, by the size of the catalog."""
    users = write_rows(settings, users=100, each=200)
    own = settings.model_copy(update={"impressions": False})

    async def answers(n: int) -> float:
        recommender = Recommender(own)
        await recommender.start()
        began_s = 0.0
        for k in range(n + 10):
            if k == 10:
                began_s = time.process_time()
            await recommender.answer(RecommendRequest(user_id=f"user-{k % users}", n=20))
        spent_s = time.process_time() - began_s
        await recommender.stop()
        return spent_s / n * 1e6

    found = {}
    for items, n in ((4_000, 300), (100_000, 100), (1_000_000, 20)):
        publish(settings, items)
        found[f"answer_{items}_items_cpu_us"] = asyncio.run(answers(n))
    return found


def catalog_of(items: int) -> Catalog:
    catalog = Catalog()
    catalog.add(f"A Film of the Usual Length ({item})" for item in range(items))
    return catalog


def publish(settings: Settings, items: int) -> float:
    """Let a random student of this size serve; its bytes."""
    registry = Registry(settings.registry)
    with tempfile.TemporaryDirectory() as aside:
        directory = Path(aside) / "student"
        Student(recipes.tiny_cpu().student, n_rows=items + 1).save(directory)
        pq.write_table(catalog_of(items).to_table(), directory / "catalog.parquet")
        size = sum(f.stat().st_size for f in directory.iterdir())
        version = registry.publish("student", directory, {"teacher_version": 1, "arrivals_ms": {}})
    registry.promote("student", version, "to be measured")
    return float(size)


def measure_sizes(settings: Settings) -> dict[str, float]:
    """Bytes of a student's version, and the time of a catalog of a million items to publish."""
    return {f"student_{n}_items_bytes": publish(settings, n) for n in (4_000, 100_000)}


def measure_memory(settings: Settings) -> dict[str, float]:
    """Bytes of an event where a job holds the log: as it is read, remembered, and learned."""
    made = events(50_000)
    log = EventLog(settings.offline)
    for first in range(0, len(made), 10_000):
        part = made[first : first + 10_000]
        arrived = [
            Arrived(record=e, arrival_ms=NOW_MS, partition=0, offset=first + i)
            for i, e in enumerate(part)
        ]
        log.append(events_table(arrived))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    table = log.read(columns=COLUMNS)
    read = pool.max_memory() - before
    state = state_of(Received.of_log(table), LOG_ITEMS, recipe=recipes.tiny_cpu(), seed=0)
    return {
        "read_bytes_per_event": read / len(made),
        "table_bytes_per_event": table.nbytes / len(made),
        "remembered_bytes_per_event": state.histories.to_table().nbytes / len(made),
        "shard_bytes_per_event": shard_bytes(settings) / len(made),
    }


def shard_bytes(settings: Settings) -> float:
    """What a teacher's worker holds of a log that is all its own: the shard, and what of it is
    learned until the end of the run."""
    [everything] = EventLog(settings.offline).portions(until={}, records=10**9)
    told, part = teacher_log.read(everything, settings.offline, {}, 1)
    plan = teacher_log.planned([told], Catalog(), last_slice=0.02)
    _, shard = teacher_log.build(plan, part)
    parts = (shard.sequences, shard.past())
    arrays = [array for one in parts for array in (*one.features, one.starts)]
    return sum(array.nbytes for array in (*arrays, shard.fresh_E, shard.judged_E))


def measure_distil(settings: Settings) -> dict[str, float]:
    """CPU of an event in the distillation loop: the student's share, and the teacher's."""
    found = {}
    for items in (4_000, 100_000):
        for taught in (False, True):
            cpu = distil_cpu_us(settings, items=items, taught=taught)
            found[f"distil_{items}_items_{'taught' if taught else 'alone'}_cpu_us"] = cpu
    return found


def distil_cpu_us(settings: Settings, *, items: int, taught: bool) -> float:
    recipe = recipes.tiny_cpu()
    config = replace(recipe.distill, stale_teacher=False, max_events=200)
    recipe = replace(recipe, distill=config)
    known, n = 4_000, 600
    log = as_log(events(known + n, items=items), items)
    torch.set_num_threads(1)
    state = state_of(log.received(0, known), log.items, recipe=recipe, seed=0)
    state.positions = {0: known}
    source = ArraySource(log, known, known + n)
    kept = {}
    if taught:
        directory = settings.home / f"teacher-{items}"
        catalog = log.catalog(len(log))
        save_teacher(Teacher(recipe.teacher, n_rows=len(catalog)), catalog, directory)
        kept = {known: directory}
    teachers = ArrayTeachers(kept, source, config)
    teachers.align(state.catalog)
    teachers.look()
    distiller = Distiller(
        state,
        source,
        teachers,
        settings=settings.model_copy(update={"publish_every_s": 1e6, "checkpoint_every_s": 1e6}),
        config=config,
        peers=ALONE,
        keep=lambda: None,
    )
    distiller.tick()
    began_s = time.process_time()
    at = source.at
    while source.at < known + n:
        distiller.tick()
    return (time.process_time() - began_s) / (source.at - at) * 1e6


def as_log(made: list[Event], items: int) -> Events:
    users = {event.user_id: i for i, event in enumerate({e.user_id: e for e in made}.values())}
    item_ids = ["", *catalog_of(items + 1).ids(range(1, items + 2))]
    rows = {item: row for row, item in enumerate(item_ids)}
    n = len(made)
    return Events(
        user_N=np.array([users[e.user_id] for e in made]),
        row_N=np.array([rows[e.item_id] for e in made]),
        type_N=np.array([e.type.value for e in made]),
        value_N=np.full(n, 4.0),
        time_ms_N=np.array([e.timestamp for e in made]),
        real_N=np.ones(n, bool),
        user_ids=list(users),
        item_ids=item_ids,
        items=pa.Table.from_pylist(  # all of them are known
            [{"item_id": item, "title": item, "categories": []} for item in item_ids[1:]],
            schema=LOG_ITEMS.schema,
        ),
    )


PARTS: dict[str, Callable[[Settings], dict[str, float]]] = {
    "gateway": measure_gateway,
    "worker": measure_worker,
    "answers": measure_answers,
    "sizes": measure_sizes,
    "memory": measure_memory,
    "distil": measure_distil,
}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as home, stack(Path(home)) as settings:
            found = PARTS[name](settings)
        line = json.dumps({key: round(value, 1) for key, value in found.items()})
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
