"""What a row of a table is made of: the rank of every predicted event; all metrics follow.

Shapes: N predicted events, U users, S bootstrap samples, V catalog rows.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.core.metrics import MISS, Ranks, gains_at, hr_at, mrr, ndcg_at

Ints = NDArray[np.int64]
Gains = NDArray[np.float64]

SAMPLES = 1_000  # of the bootstrap
LEVEL = 0.95
_META = b"reflux"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a row took; NaN where it says nothing."""

    parameters: int = 0
    forward_ms: float = float("nan")  # one user's scores over the catalog, on one core
    train_s: float = float("nan")  # wall time
    peak_mb: float = float("nan")  # of the process


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One ranker's ranks of N events.

    event_N tells which event (its place in the protocol's log), so that rows can be compared
    event by event; part_N is free for the protocol (a block, a task). `shown`: distinct catalog
    rows that stood in its top-10 lists, of `catalog_rows` there were. `notes`: anything else to
    keep, as JSON.
    """

    event_N: Ints
    user_N: Ints
    rank_N: Ranks
    part_N: Ints | None = None
    shown: int = 0
    catalog_rows: int = 0
    cost: Cost = field(default_factory=Cost)
    notes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rank_N)

    def metrics(self, k: int = 10) -> dict[str, float]:
        """One target an event: recall is the hit rate, precision a k-th of it."""
        hit_rate = hr_at(self.rank_N, k)
        return {
            f"ndcg@{k}": ndcg_at(self.rank_N, k),
            f"hr@{k}": hit_rate,
            f"precision@{k}": hit_rate / k,
            f"f1@{k}": 2 * hit_rate / (k + 1),
            "mrr": mrr(self.rank_N),
            "coverage": self.shown / self.catalog_rows if self.catalog_rows else float("nan"),
        }

    def _columns(self) -> dict[str, Ints]:
        columns = {"event_N": self.event_N, "user_N": self.user_N, "rank_N": self.rank_N}
        return columns if self.part_N is None else {**columns, "part_N": self.part_N}

    def save(self, path: Path, *, key: str) -> None:
        """Write a Parquet file at once or not at all; `key` tells what made it (`key_of`)."""
        facts = {
            "key": key,
            "shown": self.shown,
            "catalog_rows": self.catalog_rows,
            "cost": asdict(self.cost),
            "notes": self.notes,
        }
        columns = {name.removesuffix("_N"): value for name, value in self._columns().items()}
        columns["rank"] = np.where(self.rank_N == MISS, 0, self.rank_N)  # 0: could not be ranked
        table = pa.table(columns).replace_schema_metadata({_META: json.dumps(facts).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".writing")
        pq.write_table(table, scratch, compression="zstd")
        scratch.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Outcome":
        table = pq.read_table(path)
        facts = _facts(path)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        return cls(
            event_N=columns["event"],
            user_N=columns["user"],
            rank_N=np.where(columns["rank"] == 0, MISS, columns["rank"]),
            part_N=columns.get("part"),
            shown=facts["shown"],
            catalog_rows=facts["catalog_rows"],
            cost=Cost(**facts["cost"]),
            notes=facts["notes"],
        )


def saved_key(path: Path) -> str | None:
    """The key under which a row was saved there; None where there is none."""
    return _facts(path)["key"] if path.exists() else None


def _facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(pq.read_schema(path).metadata[_META])
    return facts


class Bootstrap:
    """Mean NDCG@10 of rows over the same resampled users (S draws of U users with replacement).

    Users, not events: a user's events aren't independent. What is compared shares its users, so
    differences and ratios of rows are paired.

    >>> ranks = {"a": np.array([1, 1, 1, 2]), "b": np.array([1, 2, 2, 2])}
    >>> outcomes = {
    ...     name: Outcome(event_N=np.arange(4), user_N=np.array([7, 7, 8, 9]), rank_N=rank_N)
    ...     for name, rank_N in ranks.items()
    ... }
    >>> low, high = Bootstrap(outcomes).interval(lambda mean: mean["a"] - mean["b"])
    >>> low >= 0
    True
    """

    def __init__(self, outcomes: Mapping[str, Outcome]) -> None:
        users = np.unique(np.concatenate([o.user_N for o in outcomes.values()]))
        rng = np.random.default_rng(0)
        weight_SU = rng.multinomial(len(users), np.full(len(users), 1 / len(users)), SAMPLES)
        self.mean: dict[str, float] = {}
        self._mean_S: dict[str, Gains] = {}
        for name, outcome in outcomes.items():
            gain_N = gains_at(outcome.rank_N, 10)
            at_N = np.searchsorted(users, outcome.user_N)
            sum_U = np.bincount(at_N, gain_N, minlength=len(users))
            count_U = np.bincount(at_N, minlength=len(users))
            self.mean[name] = float(gain_N.mean()) if len(gain_N) else 0.0
            self._mean_S[name] = (weight_SU @ sum_U) / np.maximum(weight_SU @ count_U, 1)

    def interval(self, statistic: Callable[[Any], Any]) -> tuple[float, float]:
        """95% of the samples' values of a statistic of the rows' means (vectorised over S)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value_S = np.asarray(statistic(self._mean_S))
        low, high = np.nanquantile(value_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
