"""How much of everything a load needs, what that costs, and what breaks first.

    python deploy/capacity.py        the tables of deploy/capacity.md

`plan` is arithmetic over the constants below; `simulate` lets events and answers run through such a
plan tick by tick, and says whether it holds. Constants are measured (`python -m deploy.measure`:
CPU time of one core of an AMD EPYC) or cited; GPU figures are estimates, and marked so.
"""

import math
import sys
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
GIB, MB = 2**30, 1e6


@dataclass(frozen=True, kw_only=True)
class Measured:
    """By deploy/measure.py, 2026-11-22, recipe tiny_cpu. `_us`: CPU microseconds.

    Answers: by `reflux bench serve`, 2026-11-28, with 10,000 and 1,000,000 items.
    """

    request_us: float = 1_170.0  # of the gateway, whatever is in it
    event_us: float = 52.0  # of the gateway, for each event in a request
    worker_us: float = 292.5  # feature worker: online and log
    answer_us: float = 1_480.0  # proxy, Serve, online read, encoder ...
    answer_us_per_item: float = 0.003  # ... and every item scored, of a big catalog coarsely
    student_us: float = 205.0  # distillation: the student's share of an event ...
    student_us_per_item: float = 0.074  # ... of which most is the softmax over all items
    teacher_us: float = 186.0  # labels, where CPUs give them
    teacher_us_per_item: float = 0.034
    event_bytes: float = 194.0  # in Kafka, key and value, not compressed
    log_bytes: float = 913.0  # of an event in the offline log (16) and its user's row there (897)
    row_bytes: float = 70.8  # of an event in a user's online row
    remembered_bytes: float = 22.4  # of an event in the distillation's memory
    read_bytes: float = 285.0  # of an event while a portion of the log is read
    shard_bytes: float = 14.0  # of an event in a teacher's worker
    student_bytes_per_item: float = 176.0  # of a published version


@dataclass(frozen=True, kw_only=True)
class Cited:
    """What others have measured, and what things cost (list prices, us-east-1)."""

    # Kreps, "Benchmarking Apache Kafka: 2 million writes per second (on three cheap machines)",
    # 2014: 193 MB/s of 100-byte records from three producers, replicated three times.
    broker_bytes_per_s: float = 193e6 / 3
    # redis.io, "Redis benchmark": > 100,000 GET or SET a second on one core, without pipelining.
    redis_ops_per_s: float = 100_000
    network_bytes_per_s: float = 12.5e9 / 8  # 12.5 Gbit/s: an m7i.4xlarge
    # NVIDIA H100 datasheet: 989 TFLOPS, dense bf16. The share of it that training reaches is an
    # assumption: no GPU was at hand.
    gpu_flops: float = 989e12
    gpu_share: float = 0.2
    core_hour_usd: float = 0.8064 / 16  # m7i.4xlarge: 16 vCPU
    gib_hour_usd: float = 1.0584 / 128  # r7i.4xlarge: 128 GiB
    gpu_hour_usd: float = 55.04 / 8  # p5.48xlarge: 8 H100
    stored_gb_month_usd: float = 0.023  # S3 standard


M, C = Measured(), Cited()

BUSY = 0.6  # of a core that waits for others: room for skew and restarts
LEARNER_BYTES, TEACHER_BYTES = 12 * GIB, 32 * GIB  # of a worker's pod (overlays/production)
PUBLISH_S, FLUSH_S = 5.0, 10.0
USERS_DIFFER = 3.0  # standard deviation of their activity over its mean; MovieLens-1M: 1.2
REBALANCE_S = 10.0  # until others have a lost worker's partitions: session and join
LEARNERS = 64  # distillation workers, as many as seems sane
TEACHERS = 8  # workers of a teacher, as in recipe many_gpus
TEACHER_FLOP = 6 * 12 * 12 * 512**2 + 6 * 8192 * 512  # a trained event of recipe many_gpus
REFRESH_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Load:
    """What comes in. Rates are of the busiest minute."""

    name: str
    events_per_s: float
    answers_per_s: float
    users: float
    items: float
    user_events: float = 200  # remembered online of each; at most REFLUX_HISTORY_EVENTS
    events_per_request: float = 10
    log_days: float = 30  # of events that the jobs read: a longer log is no longer read whole


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cores (of this machine's kind), GPUs, bytes."""

    gateway_cores: float
    worker_cores: float
    distil_cores: float
    label_cores: float
    answer_cores: float
    partitions: int
    brokers: int
    redis_bytes: float
    redis_bytes_per_s: float
    kafka_bytes_per_s: float
    log_bytes_per_day: float
    fetch_bytes_per_s: float  # of new versions, by all replicas
    teacher_gpus: float


def student_us(load: Load) -> float:
    return M.student_us + M.student_us_per_item * load.items


def answer_us(load: Load) -> float:
    return M.answer_us + M.answer_us_per_item * load.items


def plan(load: Load) -> Plan:
    """The least that holds the load with `BUSY` cores."""
    events, cores = load.events_per_s, 1e6 * BUSY
    worker_cores = events * M.worker_us / cores
    distil_cores = events * student_us(load) / cores
    answer_cores = load.answers_per_s * answer_us(load) / cores
    kafka = events * M.event_bytes
    brokers = max(3, math.ceil(kafka / (C.broker_bytes_per_s * BUSY)))
    readers = max(worker_cores, distil_cores)
    row = M.row_bytes * load.user_events
    return Plan(
        gateway_cores=events * (M.event_us + M.request_us / load.events_per_request) / cores,
        worker_cores=worker_cores,
        distil_cores=distil_cores,
        label_cores=events * (M.teacher_us + M.teacher_us_per_item * load.items) / cores,
        answer_cores=answer_cores,
        # Twice the readers, so that they can double, in whole rounds of brokers.
        partitions=brokers * math.ceil(max(4, 2 * readers) / brokers),
        brokers=brokers,
        redis_bytes=load.users * row,
        # A poll rewrites a user's whole row for each event (fewer where a user's events come
        # together), and an answer reads it.
        redis_bytes_per_s=(2 * events + load.answers_per_s) * row,
        kafka_bytes_per_s=kafka * 3 + kafka * 2,  # written to three, read by workers and jobs
        log_bytes_per_day=events * M.log_bytes * 86_400,
        fetch_bytes_per_s=answer_cores * M.student_bytes_per_item * load.items / PUBLISH_S,
        teacher_gpus=REFRESH_EPOCHS * events * TEACHER_FLOP / (C.gpu_flops * C.gpu_share),
    )


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What no number of pods raises, and the events/s at which it is reached."""

    what: str
    events_per_s: float
    then: str


def ceilings(load: Load) -> list[Ceiling]:
    """The lowest first: what breaks as this load grows with its users and items as they are."""
    row = M.row_bytes * load.user_events
    log_s = load.log_days * 86_400
    found = [
        Ceiling(
            what=f"{TEACHERS} workers of 32 GiB hold the log that the teacher learns",
            events_per_s=TEACHERS * TEACHER_BYTES / (M.shard_bytes * log_s),
            then="more workers; a bound on the log that is read",
        ),
        Ceiling(
            what=f"{LEARNERS} distillation workers of 12 GiB remember every event",
            events_per_s=LEARNERS * LEARNER_BYTES / (M.remembered_bytes * log_s),
            then="a bound on users, the rest from the online store",
        ),
        Ceiling(
            what=f"{LEARNERS} distillation workers score every item for every event",
            events_per_s=LEARNERS * 1e6 * BUSY / student_us(load),
            then="a sampled softmax for the student",
        ),
        Ceiling(
            what="one Redis primary: a core's operations",
            events_per_s=C.redis_ops_per_s * BUSY / 2,
            then="a Redis cluster",
        ),
        Ceiling(
            what="one Redis primary: its network",
            events_per_s=C.network_bytes_per_s * BUSY / (2 * row),
            then="a Redis cluster; append instead of rewriting rows",
        ),
        Ceiling(
            what="one user sends 1% of the events, to one worker",
            events_per_s=100 * 1e6 / M.worker_us,
            then="a limit for each user at the gateway",
        ),
    ]
    return sorted(found, key=lambda ceiling: ceiling.events_per_s)


def cost_usd_per_hour(load: Load) -> dict[str, float]:
    """By part. A broker: four cores. Not here: its disks, traffic between zones, people."""
    p = plan(load)
    stored_gb = p.log_bytes_per_day * load.log_days / 1e9
    return {
        "gateway, workers, Kafka": C.core_hour_usd
        * (p.gateway_cores + p.worker_cores + 4 * p.brokers),
        "online store": C.gib_hour_usd * 1.5 * p.redis_bytes / GIB,
        "distillation": C.core_hour_usd * (p.distil_cores + p.label_cores),
        "teacher": C.gpu_hour_usd * p.teacher_gpus,
        "answers": C.core_hour_usd * p.answer_cores,
        "log": C.stored_gb_month_usd * stored_gb / 730,
    }


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Of a simulated run."""

    worker_lag_s: float  # the largest of any partition, in seconds of its own arrivals
    recovered_s: float  # from the loss of a worker until nobody is a second behind
    learn_lag_s: float
    answer_p99_ms: float
    busiest_worker: float  # share of its time


def simulate(
    load: Load, p: Plan, *, seconds: int = 120, tick_s: float = 0.5, seed: int = 0
) -> Simulated:
    """Events through partitions to feature workers and to distillation workers, tick by tick.

    Partitions get unequal shares, since users are of unequal activity. A feature worker flushes
    every `FLUSH_S` and does little else meanwhile; at half time one is lost, and after 10 s the
    others have its partitions. Answers: `answer_waits`.
    """
    rng = np.random.default_rng(seed)
    workers, learners = (max(2, math.ceil(c)) for c in (p.worker_cores, p.distil_cores))
    share_P = partition_shares(load, p.partitions, rng)
    came_per_s_P = load.events_per_s * share_P
    worker_P = np.arange(p.partitions) % workers
    learner_P = np.arange(p.partitions) % learners
    waiting_P, unlearned_P = np.zeros(p.partitions), np.zeros(p.partitions)
    can_learn_L = np.full(learners, tick_s * 1e6 / student_us(load))
    spent_W = np.zeros(workers)
    lag_s = learn_lag_s = recovered_s = 0.0
    lost_at_s = seconds / 2
    for now_s in np.arange(0, seconds, tick_s):
        came_P = rng.poisson(came_per_s_P * tick_s)
        waiting_P += came_P
        unlearned_P += came_P
        if now_s == lost_at_s + REBALANCE_S:
            others_P = 1 + np.arange(p.partitions) % (workers - 1)
            worker_P = np.where(worker_P == 0, others_P, worker_P)
        flushes_W = (np.arange(workers) * 0.37 + now_s) % FLUSH_S < tick_s
        can_W = np.where(flushes_W, 0.2, 1.0) * tick_s * 1e6 / M.worker_us
        can_W[0] *= now_s < lost_at_s
        done_W = _serve(waiting_P, worker_P, can_W)
        _serve(unlearned_P, learner_P, can_learn_L)
        behind_s = float((waiting_P / came_per_s_P).max())
        learn_lag_s = max(learn_lag_s, float((unlearned_P / came_per_s_P).max()))
        if now_s < lost_at_s:
            spent_W += done_W * M.worker_us / 1e6
            lag_s = max(lag_s, behind_s)
        elif behind_s > 1.0:
            recovered_s = now_s - lost_at_s
    return Simulated(
        worker_lag_s=lag_s,
        recovered_s=recovered_s,
        learn_lag_s=learn_lag_s,
        answer_p99_ms=float(np.quantile(answer_waits(load, p, rng), 0.99)) * 1e3,
        busiest_worker=float(spent_W.max() / lost_at_s),
    )


def partition_shares(load: Load, partitions: int, rng: np.random.Generator) -> Floats:
    """Of the events, where users are hashed: sums of many differ less than users do."""
    spread = USERS_DIFFER / math.sqrt(load.users / partitions)
    share_P = np.maximum(rng.normal(1.0, spread, partitions), 0.01)
    return share_P / share_P.sum()


def answer_waits(load: Load, p: Plan, rng: np.random.Generator, *, n: int = 40_000) -> Floats:
    """Seconds that answers take on up to 16 replicas with their part of the load: each goes to the
    one with the least before it, and takes a time of its own (gamma, shape 4)."""
    mean_s = answer_us(load) / 1e6
    replicas = min(16, max(2, math.ceil(p.answer_cores)))
    per_replica = load.answers_per_s / max(2, math.ceil(p.answer_cores))
    arrivals_s = np.cumsum(rng.exponential(1 / (per_replica * replicas), n))
    service_s = rng.gamma(4.0, mean_s / 4.0, n)
    free_R, taken_s = np.zeros(replicas), np.zeros(n)
    for i in range(n):
        first = int(free_R.argmin())
        free_R[first] = max(free_R[first], arrivals_s[i]) + service_s[i]
        taken_s[i] = free_R[first] - arrivals_s[i]
    return taken_s


def _serve(waiting_P: Floats, owner_P: Ints, can_W: Floats) -> Floats:
    """Take from each partition its part of what its owner can do; what each owner did."""
    has_W = np.bincount(owner_P, waiting_P, len(can_W))
    part_W = np.divide(can_W, has_W, out=np.ones_like(has_W), where=has_W > 0).clip(max=1.0)
    waiting_P -= waiting_P * part_W[owner_P]
    return has_W * part_W


LOADS = [
    Load(name="10,000 events/s", events_per_s=1e4, answers_per_s=1e3, users=1e6, items=2e4),
    Load(name="1,000,000 events/s", events_per_s=1e6, answers_per_s=1e5, users=1e8, items=2e5),
]


def report() -> str:
    """The tables of deploy/capacity.md."""
    plans = [plan(load) for load in LOADS]
    runs = [simulate(load, p) for load, p in zip(LOADS, plans, strict=True)]
    costs = [cost_usd_per_hour(load) for load in LOADS]
    rows = [
        ["answers/s", *(f"{load.answers_per_s:,.0f}" for load in LOADS)],
        ["users; items", *(f"{load.users:,.0f}; {load.items:,.0f}" for load in LOADS)],
        ["gateway cores", *(f"{p.gateway_cores:,.1f}" for p in plans)],
        ["feature worker cores", *(f"{p.worker_cores:,.1f}" for p in plans)],
        ["distillation cores", *(f"{p.distil_cores:,.0f}" for p in plans)],
        ["labelling cores (or GPUs)", *(f"{p.label_cores:,.0f}" for p in plans)],
        ["answer cores", *(f"{p.answer_cores:,.1f}" for p in plans)],
        ["teacher GPUs, estimated", *(f"{p.teacher_gpus:.2f}" for p in plans)],
        ["partitions; brokers", *(f"{p.partitions:,}; {p.brokers}" for p in plans)],
        ["Redis memory, GiB", *(f"{p.redis_bytes / GIB:,.0f}" for p in plans)],
        ["Redis traffic, MB/s", *(f"{p.redis_bytes_per_s / MB:,.0f}" for p in plans)],
        ["Kafka traffic, MB/s", *(f"{p.kafka_bytes_per_s / MB:,.0f}" for p in plans)],
        ["versions fetched, MB/s", *(f"{p.fetch_bytes_per_s / MB:,.0f}" for p in plans)],
        ["offline log, GB a day", *(f"{p.log_bytes_per_day / 1e9:,.0f}" for p in plans)],
    ]
    rows += [[f"USD an hour: {part}", *(f"{c[part]:,.2f}" for c in costs)] for part in costs[0]]
    per_million = [
        sum(cost.values()) / (load.answers_per_s * 3600) * 1e6
        for cost, load in zip(costs, LOADS, strict=True)
    ]
    rows.append(["**USD a million answers**", *(f"**{usd:.2f}**" for usd in per_million)])
    rows += [
        [f"simulated: {label}", *(f"{getattr(run, name):,.2f}" for run in runs)]
        for name, label in zip(
            (field.name for field in fields(Simulated)),
            (
                "features late by, s",
                "caught up after a lost worker, s",
                "learned late by, s",
                "answer, p99 ms",
                "the busiest worker's time in use",
            ),
            strict=True,
        )
    ]
    parts = [_table(["", *(load.name for load in LOADS)], rows)]
    for load in LOADS:
        found = [[c.what, f"{c.events_per_s:,.0f}", c.then] for c in ceilings(load)]
        title = f"{load.items:,.0f} items, {load.log_days:.0f} days of log: breaks at, events/s"
        parts.append(_table([title, "", "then"], found))
    constants = [[f"`{field.name}`", f"{getattr(M, field.name):,g}"] for field in fields(M)]
    parts.append(_table(["measured, of one event, answer, request or item", ""], constants))
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(report())
