"""Small random students, published like real ones, for whoever needs something that answers."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from services.core.catalog import Catalog
from services.core.models.sizes import StudentConfig
from services.core.models.student import Student
from services.core.registry import Registry

N_ITEMS = 60
CATEGORIES = ("Comedy", "Drama", "Horror")
SCORE_STEP = 1_000.0  # far above what a random student scores


def item(number: int) -> str:
    return f"item-{number}"


def catalog(*, title: str = "", n_items: int = N_ITEMS) -> Catalog:
    """item-0 .. item-<n-1>; item i has category i % 3, and item 7 is the most popular, then 8."""
    made = Catalog()
    numbers = range(n_items)
    made.describe(
        pa.table(
            {
                "item_id": [item(i) for i in numbers],
                "title": [title or f"Title {i}" for i in numbers],
                "categories": [[CATEGORIES[i % 3]] for i in numbers],
                "text": pa.nulls(n_items, pa.string()),
            }
        )
    )
    made.observe(made.rows([item(7)] * 3 + [item(8)] * 2 + [item(9)]))
    return made


def publish(registry: Registry, aside: Path, *, seed: int = 0, **manifest: Any) -> int:
    """Publish a student, not promoted. Its version is written all over it: every title is
    `v<version>`, and its scores lie around `version * SCORE_STEP`."""
    version = (registry.latest("student") or 0) + 1
    made = catalog(title=f"v{version}")
    torch.manual_seed(seed)
    config = StudentConfig(dim=16, n_layers=2, n_heads=2, max_len=32, teacher_dim=32)
    student = Student(config, n_rows=len(made))
    student.describe(made.content)
    student.bias_V.data.fill_(version * SCORE_STEP)
    directory = aside / f"student-{version}-{time.monotonic_ns()}"
    student.save(directory)
    pq.write_table(made.to_table(), directory / "catalog.parquet")
    now_ms = time.time_ns() // 1_000_000
    given = {"teacher_version": 3, "arrivals_ms": {"oldest": now_ms, "newest": now_ms}}
    assert registry.publish("student", directory, {**given, **manifest}) == version
    return version
