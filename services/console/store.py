"""The page's past: samples and versions in a sqlite file that stays as small as it is.

Samples lie in rings: every ten seconds of two hours, every minute of a day, every ten minutes of
thirty days; the coarser ones are means. About 5 MB when full.
"""

import logging
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

log = logging.getLogger(__name__)

SAMPLE_S: Final = 10
KEPT_VERSIONS: Final = 1_000  # of each kind
_SCHEMA: Final = """
create table if not exists samples (
    ring integer, slot integer, at_ms integer, n integer, body blob, primary key (ring, slot)
) without rowid;
create table if not exists versions (
    kind text, version integer, body blob, primary key (kind, version)
) without rowid;
pragma user_version = 1;
"""


@dataclass(frozen=True)
class Ring:
    step_s: int
    slots: int


RINGS: Final = (Ring(SAMPLE_S, 720), Ring(60, 1_440), Ring(600, 4_320))


class Store:
    """Safe to use from several threads. A file that can't be read is begun anew: it holds no more
    than what a page showed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = _opened(path)
        except sqlite3.OperationalError as error:  # no room, or no right: what it has stays
            log.warning("%s: %s; what comes now is kept until this process ends", path, error)
            self._db = _opened(":memory:")
        except sqlite3.DatabaseError:
            path.unlink()
            self._db = _opened(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, at_ms: int, values: Mapping[str, float | None]) -> None:
        """One sample, into every ring."""
        given = {name: value for name, value in values.items() if value is not None}
        with self._lock, self._db:
            for number, ring in enumerate(RINGS):
                step = at_ms // (1000 * ring.step_s)
                slot, begin_ms = step % ring.slots, step * 1000 * ring.step_s
                found = self._db.execute(
                    "select n, body from samples where ring = ? and slot = ? and at_ms = ?",
                    (number, slot, begin_ms),
                ).fetchone()
                n, before = (found[0], orjson.loads(found[1])) if found else (0, {})
                body = orjson.dumps(_mean(before, given, n))
                self._db.execute(
                    "insert or replace into samples values (?, ?, ?, ?, ?)",
                    (number, slot, begin_ms, n + 1, body),
                )

    def history(self, *, since_ms: int, until_ms: int) -> dict[str, Any]:
        """Columns (`at`: ms, and one per series, None where it has a gap) of the finest ring that
        reaches back so far."""
        number = next(
            (n for n, ring in enumerate(RINGS) if until_ms - since_ms <= 1000 * _span_s(ring)),
            len(RINGS) - 1,
        )
        with self._lock:
            rows = self._db.execute(
                "select at_ms, body from samples where ring = ? and at_ms between ? and ?"
                " order by at_ms",
                (number, since_ms, until_ms),
            ).fetchall()
        bodies = [orjson.loads(body) for _, body in rows]
        names = sorted({name for body in bodies for name in body})
        return {
            "step_ms": 1000 * RINGS[number].step_s,
            "at": [at_ms for at_ms, _ in rows],
            "series": {name: [body.get(name) for body in bodies] for name in names},
        }

    def add_versions(self, rows: list[dict[str, Any]]) -> None:
        with self._lock, self._db:
            self._db.executemany(
                "insert or replace into versions values (?, ?, ?)",
                [(row["kind"], row["version"], orjson.dumps(row)) for row in rows],
            )
            for kind in {row["kind"] for row in rows}:
                self._db.execute(
                    "delete from versions where kind = ? and version not in (select version from"
                    " versions where kind = ? order by version desc limit ?)",
                    (kind, kind, KEPT_VERSIONS),
                )

    def versions(self) -> list[dict[str, Any]]:
        """By kind, oldest first."""
        with self._lock:
            rows = self._db.execute("select body from versions order by kind, version").fetchall()
        return [orjson.loads(body) for (body,) in rows]


def _opened(path: Path | str) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = off")  # a crash may cost a sample
    db.execute("pragma journal_size_limit = 1000000")
    db.executescript(_SCHEMA)
    return db


def _mean(before: dict[str, float], given: dict[str, float], n: int) -> dict[str, float]:
    mixed = {
        name: (before[name] * n + value) / (n + 1) if name in before else value
        for name, value in given.items()
    }
    return {**before, **{name: float(f"{value:.6g}") for name, value in mixed.items()}}


def _span_s(ring: Ring) -> int:
    return ring.step_s * ring.slots
