"""What takes torch or Parquet: the teacher's answers, who was here lately, the newest items.

    python -m services.console.heavy        # started by the console when it is asked for these

One JSON object a line on standard input, one on standard output. Ends with its input.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from services.core.errors import NothingServingError, RefluxError
from services.core.registry import Registry
from services.core.settings import Settings

USERS_EVENTS: Final = 2_000  # newest of each partition, among which users are looked for


class Heavy:
    """Keeps the newest teacher loaded."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = Registry(settings.registry)
        self._loaded: tuple[int, Any, Any] | None = None  # version, Teacher, Catalog

    def teacher(
        self, *, events: list[dict[str, Any]], recent_items: list[str], n: int
    ) -> dict[str, Any]:
        """The `n` best items after these events (newest last) and, after them, recent items."""
        import numpy as np
        import torch

        from services.core.events import EventType
        from services.core.models.sequences import features_of

        version, teacher, catalog = self._newest_teacher()
        began_s = time.perf_counter()
        now_ms = time.time_ns() // 1_000_000
        events = [
            *events,
            *({"item_id": i, "type": EventType.VIEW, "timestamp": now_ms} for i in recent_items),
        ]
        rows = catalog.rows([event["item_id"] for event in events])
        known = np.flatnonzero(rows)[-teacher.config.max_len :]
        if len(known) == 0:
            return {"version": version, "items": [], "ms": 0.0}
        stamps_ms = np.asarray([event["timestamp"] for event in events])
        values = np.asarray([np.nan if e.get("value") is None else e["value"] for e in events])
        features = features_of(
            rows[known], [events[at]["type"] for at in known], stamps_ms[known], values[known]
        )
        with torch.no_grad():
            hidden_1LD = teacher(*(torch.from_numpy(column)[None] for column in features))
            scores_V = teacher.scores(hidden_1LD[:, -1])[0]
        scores_V[torch.from_numpy(rows)] = -torch.inf
        top = scores_V.topk(min(n, len(scores_V) - 1))
        best = top.indices.tolist()
        columns = (
            catalog.ids(best),
            top.values.tolist(),
            catalog.titles(best),
            catalog.categories(best),
        )
        names = ("item_id", "score", "title", "categories")
        items = [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]
        return {
            "version": version,
            "items": [item for item in items if np.isfinite(item["score"])],
            "ms": 1000 * (time.perf_counter() - began_s),
        }

    def users(self, *, n: int) -> dict[str, Any]:
        """Who did something last, the latest first."""
        import pyarrow.compute as pc

        from services.core.eventlog import EventLog
        from services.core.events import EventType

        log = EventLog(self._settings.offline)
        since = {partition: max(0, end - USERS_EVENTS) for partition, end in log.end().items()}
        events = log.read(since=since, columns=["user_id", "type", "arrival"])
        events = events.filter(pc.not_equal(events["type"], EventType.IMPRESSION))
        events = events.sort_by([("arrival", "descending")])
        return {"users": list(dict.fromkeys(events["user_id"].to_pylist()))[:n]}

    def newest(self, *, n: int) -> dict[str, Any]:
        """The items that the serving student learned of last, the latest first."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            version = self._registry.serving("student").version
        except NothingServingError:
            return {"version": None, "items": []}
        with tempfile.TemporaryDirectory() as scratch:
            directory = self._registry.fetch("student", version, Path(scratch))
            columns = ["item_id", "title", "categories", "popularity"]
            table: pa.Table = pq.read_table(directory / "catalog.parquet", columns=columns)
        items = table.slice(max(0, len(table) - n)).to_pylist()[::-1]
        return {"version": version, "items": items}

    def _newest_teacher(self) -> tuple[int, Any, Any]:
        import pyarrow.parquet as pq
        import torch

        from services.core.catalog import Catalog
        from services.core.models.teacher import Teacher

        torch.set_num_threads(1)
        version = self._registry.serving("teacher").version
        if self._loaded is None or self._loaded[0] != version:
            with tempfile.TemporaryDirectory() as scratch:
                directory = self._registry.fetch("teacher", version, Path(scratch))
                catalog = Catalog.from_table(pq.read_table(directory / "catalog.parquet"))
                self._loaded = (version, Teacher.load(directory), catalog)
        return self._loaded


def answer(heavy: Heavy, line: bytes) -> dict[str, Any]:
    """One request to one result or error; never raises."""
    try:
        request = json.loads(line)
        methods: dict[str, Callable[..., dict[str, Any]]] = {
            "teacher": heavy.teacher,
            "users": heavy.users,
            "newest": heavy.newest,
        }
        return {"result": methods[request.pop("what")](**request)}
    except (RefluxError, OSError, ValueError, KeyError) as error:
        return {"error": f"{error}" if isinstance(error, RefluxError) else repr(error)}


def main() -> None:
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    os.nice(10)  # answers come first
    heavy = Heavy(Settings.load())
    for line in sys.stdin.buffer:
        out.write(json.dumps(answer(heavy, line)).encode() + b"\n")


if __name__ == "__main__":
    main()
