"""The best items for every user in the log, as Parquet: a Ray Data job for e-mail, warm caches.

    ray job submit --working-dir . --runtime-env-json "$(reflux env)" -- \
        python -m services.recommend.everyone --out s3://bucket/answers -n 10

Histories come from the offline log, exact up to its end; one student version answers all. The
output's `_manifest.json` is written last: without it the output is not whole.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import torch
from pyarrow import fs

from ray_jobs import own_ray
from services.core.errors import RefluxError
from services.core.eventlog import EventLog
from services.core.history import histories_as_of
from services.core.registry import Registry
from services.core.settings import Settings
from services.recommend.engine import Model, rank
from services.recommend.live import load_apart
from services.recommend.schema import MAX_ITEMS, RecommendRequest

BLOCK_EVENTS: Final = 20_000
MANIFEST: Final = "_manifest.json"  # readers of Parquet pass over names that begin with _
EVENT_COLUMNS: Final = ("user_id", "item_id", "type", "timestamp", "arrival", "value", "event_id")
SCHEMA: Final = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("fallback", pa.string()),
        ("model_version", pa.int64()),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recommend to every user in the log.")
    parser.add_argument("--out", required=True, help="a new directory, or an s3:// or gs:// URI")
    parser.add_argument("-n", type=int, default=10, help="items per user")
    parser.add_argument("--actors", type=int, default=2, help="that rank, a CPU each")
    given = parser.parse_args()
    if not 1 <= given.n <= MAX_ITEMS:
        sys.exit(f"everyone: -n {given.n}: from 1 to {MAX_ITEMS}")
    try:
        answer_everyone(Settings.load(), given.out, n=given.n, actors=given.actors)
    except RefluxError as error:
        sys.exit(f"everyone: {error}")


def answer_everyone(settings: Settings, out: str, *, n: int, actors: int) -> dict[str, Any]:
    """Write the answers to `out`, which must be new or empty; the manifest, as it is there."""
    files, path = fs.FileSystem.from_uri(out if "://" in out else str(Path(out).absolute()))
    if files.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        raise RefluxError(f"--out {out}: there is something already; name a new directory")
    version = Registry(settings.registry).serving("student").version
    log, now_ms = EventLog(settings.offline), time.time_ns() // 1_000_000
    print(f"student {version}, reading {settings.offline}", flush=True)
    offsets = log.end()
    events = log.read(until=offsets, columns=EVENT_COLUMNS)
    if not len(events):
        raise RefluxError(f"{settings.offline}: no user has done anything yet")
    blocks = list(blocks_of_users(events))
    own_ray.join(log_to_driver=False)
    print(f"{len(events):,} events in {len(blocks)} blocks", flush=True)
    files.create_dir(path, recursive=True)
    answers = ray.data.from_arrow(blocks).map_batches(
        Ranker,
        fn_constructor_args=(settings, version, n, now_ms),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
    )
    answers.write_parquet(path, filesystem=files)
    users = len(events["user_id"].unique())
    manifest: dict[str, Any] = {"model_version": version, "users": users, "n": n, "at_ms": now_ms}
    manifest |= {"offsets": {str(partition): end for partition, end in offsets.items()}}
    with files.open_output_stream(f"{path}/{MANIFEST}") as stream:
        stream.write(json.dumps(manifest, indent=1).encode())
    print(f"{users:,} users answered in {out}", flush=True)
    return manifest


def blocks_of_users(events: pa.Table, *, block_events: int = BLOCK_EVENTS) -> Iterator[pa.Table]:
    """The events cut into blocks of about that many, every user whole in one, in the same order
    within a user. Pure."""
    codes = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    events, codes = events.take(pa.array(order)), codes[order]
    first = np.flatnonzero(np.diff(codes, prepend=-1))  # each user's first event
    begin = 0
    for at in (*first[1:].tolist(), len(codes)):
        if at - begin >= block_events or at == len(codes):
            yield events.slice(begin, at - begin)
            begin = at


class Ranker:
    """One actor, one core: the model loaded once, then block after block of users."""

    def __init__(self, settings: Settings, version: int, n: int, now_ms: int) -> None:
        torch.set_num_threads(1)
        self._limit, self._now_ms = settings.history_events, now_ms
        self._request = RecommendRequest(n=n)
        registry = Registry(settings.registry)
        self._model = load_apart(registry, version, exact_items=settings.exact_items)

    def __call__(self, events: pa.Table) -> pa.Table:
        return answers(self._model, events, self._request, limit=self._limit, now_ms=self._now_ms)


def answers(
    model: Model, events: pa.Table, request: RecommendRequest, *, limit: int, now_ms: int
) -> pa.Table:
    """`SCHEMA`, one row for each user of the events. Pure."""
    user_ids = events["user_id"].unique().to_pylist()
    end_ms = np.iinfo(np.int64).max
    histories = histories_as_of(events, user_ids, [end_ms] * len(user_ids), limit=limit)
    ranked = [rank(model, request, history, now_ms=now_ms) for history in histories]
    columns = {
        "user_id": user_ids,
        "item_ids": [model.catalog.ids(one.rows) for one in ranked],
        "scores": [one.scores for one in ranked],
        "fallback": [one.fallback for one in ranked],
        "model_version": [model.version] * len(user_ids),
    }
    return pa.table(columns, schema=SCHEMA)


if __name__ == "__main__":
    main()
